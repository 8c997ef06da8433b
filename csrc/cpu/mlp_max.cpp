// Largest output of a point MLP over the points of each cell.
//
// Least work: the layers' multiply-adds, the inputs of a point read once, the maximum of a cell written once. What lies
// between two layers stays in L1, as a tile of points passes all of them before the next begins; the last layer's
// outputs are compared in the registers that they are summed in.
//
// The CPU alone, and there AVX-512: elsewhere layer after layer is as quick, see kdmos/ops/mlp_max.py.
#include "products.h"

#if defined(__AVX512F__)
#include <algorithm>
#include <vector>

namespace kdmos {
namespace {

constexpr int kRows = 14;             // of 32 outputs: 28 sums, two weights and an input are all registers but one
constexpr int64_t kTile = 4 * kRows;  // points: 128 values of each in bfloat16 fill half of L1, the weights a quarter

// [O, D] as [O / 32][D / kStep][32][kStep], as the sums read it.
template <class T>
class Layer {
 public:
  using Block = Sums<T, kRows, 2>;

  Layer(const Tensor& weight, const float* bias)
      : inputs(weight.size(1)), outputs(weight.size(0)), bias(bias), packed(inputs * outputs) {
    constexpr int64_t kStep = Vector<T>::kStep;
    STD_TORCH_CHECK(outputs % Block::kOutputs == 0 && inputs % kStep == 0,
                    "mlp_max: outputs of a layer a multiple of ", Block::kOutputs, ", inputs of ", kStep);
    const T* from = data<T>(weight);
    T* to = packed;
    for (int64_t first = 0; first < outputs; first += Block::kOutputs) {
      for (int64_t d = 0; d < inputs; d += kStep) {
        for (int64_t o = first; o < first + Block::kOutputs; ++o) {
          for (int64_t k = 0; k < kStep; ++k) *to++ = from[o * inputs + d + k];
        }
      }
    }
  }

  // keep(sums, first output, first row) of all outputs of `rows` rows, a multiple of kRows.
  template <class Keep>
  void apply(const T* const* from, int64_t rows, const Keep& keep) const {
    for (int64_t first = 0; first < outputs; first += Block::kOutputs) {
      for (int64_t row = 0; row < rows; row += kRows) {
        Block block(bias + first);
        block.add(from + row, inputs, packed + first * inputs);
        keep(block, first, row);
      }
    }
  }

  int64_t inputs, outputs;

 private:
  const float* bias;
  Scratch<T> packed;
};

// A tile's values between two layers.
template <class T>
struct Values {
  explicit Values(int64_t outputs) : memory(kTile * outputs) {
    for (int64_t row = 0; row < kTile; ++row) rows[row] = memory + row * outputs;
  }
  Scratch<T> memory;
  T* rows[kTile];
};

template <class T>
void of_cells(const float* points, const Layer<float>& input, const std::vector<Layer<T>>& layers, const int64_t* order,
              const int64_t* start, int64_t M, T* out) {
  const int64_t C = layers.back().outputs, threads = num_threads();
  // Each thread's cells have as many points. What a point gives does not depend on its tile, and so not on the threads.
  const auto first_cell = [&](int64_t thread) {
    return thread == threads ? M : std::lower_bound(start, start + M, share(start[M], threads, thread)) - start;
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    int64_t m = first_cell(begin);
    const int64_t last = first_cell(end), stop = start[last];
    for (int64_t cell = m; cell < last; ++cell) {
      if (start[cell] == start[cell + 1]) std::memset(static_cast<void*>(out + cell * C), 0, C * sizeof(T));
    }
    std::vector<Values<T>> between;
    between.emplace_back(input.outputs);
    for (size_t i = 0; i + 1 < layers.size(); ++i) between.emplace_back(layers[i].outputs);
    const float* from[kTile];
    T* to[kTile];
    __mmask16 goes_on[kTile];
    for (int64_t i = start[m]; i < stop; i += kTile) {
      // 1) where the points are and their cells; a short block repeats its last point
      const int64_t count = std::min(kTile, stop - i), rows = (count + kRows - 1) / kRows * kRows;
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t point = std::min(i + row, stop - 1);
        while (start[m + 1] <= point) ++m;
        from[row] = points + order[point] * input.inputs;
        to[row] = out + m * C;
        goes_on[row] = point == start[m] ? 0 : 0xffff;
      }
      // 2) all layers but the last
      input.apply(from, rows, [&](const auto& sums, int64_t first, int64_t row) {
        sums.store(between[0].rows + row, first, 0.0f);
      });
      for (size_t layer = 0; layer + 1 < layers.size(); ++layer) {
        layers[layer].apply(between[layer].rows, rows, [&](const auto& sums, int64_t first, int64_t row) {
          sums.store(between[layer + 1].rows + row, first, 0.0f);
        });
      }
      // 3) the last, and its maxima
      layers.back().apply(between.back().rows, rows, [&](const auto& sums, int64_t first, int64_t row) {
        sums.store_largest(to + row, first, goes_on + row);
      });
    }
  });
}

template <class T>
Tensor mlp_max_of(const Tensor& points, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                  const Tensor& order, const Tensor& start) {
  const int64_t M = start.size(0) - 1, C = weights.back().size(0);
  const std::vector<float> none(C, 0.0f);  // the last layer has no bias
  const auto bias = [&](size_t i) { return i < biases.size() ? data<float>(biases[i]) : none.data(); };
  const Layer<float> input(weights[0], bias(0));
  std::vector<Layer<T>> layers;
  for (size_t i = 1; i < weights.size(); ++i) layers.emplace_back(weights[i], bias(i));
  Tensor out = empty_as(weights.back(), {M, C}, weights.back().scalar_type());
  of_cells(data<float>(points), input, layers, data<int64_t>(order), data<int64_t>(start), M, mutable_data<T>(out));
  return out;
}

// points float32 [N, D], weights [D', D] with biases [D'] but for the last, order [N], start [M + 1]: [M, C].
Tensor mlp_max(const Tensor& points, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
               const Tensor& order, const Tensor& start) {
  STD_TORCH_CHECK(weights.size() >= 2 && weights.size() == biases.size() + 1, "mlp_max: a bias for each layer but the last");
  STD_TORCH_CHECK(points.is_contiguous() && points.dim() == 2 && points.scalar_type() == ScalarType::Float &&
                      weights[0].scalar_type() == ScalarType::Float,
                  "mlp_max: points float32 [N, D] and a first layer of float32");
  const int64_t N = points.size(0);
  for (const Tensor* index : {&order, &start}) {
    STD_TORCH_CHECK(index->is_contiguous() && index->dim() == 1 && index->scalar_type() == ScalarType::Long &&
                        (index == &order ? index->size(0) == N : index->size(0) > 0),
                    "mlp_max: order [N] and start [M + 1], contiguous int64");
  }
  check_ascending("mlp_max: start", data<int64_t>(start), start.size(0), N + 1);
  bool inside = true;
  for (int64_t i = 0; i < N; ++i) inside &= uint64_t(data<int64_t>(order)[i]) < uint64_t(N);
  STD_TORCH_CHECK(inside, "mlp_max: order must lie within 0 and ", N);
  const ScalarType type = weights.back().scalar_type();
  int64_t inputs = points.size(1);
  for (size_t i = 0; i < weights.size(); ++i) {
    STD_TORCH_CHECK(weights[i].is_contiguous() && weights[i].dim() == 2 && weights[i].size(1) == inputs &&
                        (i == 0 || weights[i].scalar_type() == type),
                    "mlp_max: weights [D', D] that fit each other, of one dtype from the second on");
    inputs = weights[i].size(0);
    if (i == biases.size()) break;
    STD_TORCH_CHECK(biases[i].is_contiguous() && biases[i].scalar_type() == ScalarType::Float && biases[i].numel() == inputs,
                    "mlp_max: biases float32 [D']");
  }
#if defined(__AVX512BF16__)
  if (type == ScalarType::BFloat16) return mlp_max_of<BFloat16>(points, weights, biases, order, start);
#endif
  STD_TORCH_CHECK(type == ScalarType::Float, "mlp_max: not a type that this build computes in");
  return mlp_max_of<float>(points, weights, biases, order, start);
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) { m.impl("mlp_max", TORCH_BOX(&kdmos::mlp_max)); }

#endif
