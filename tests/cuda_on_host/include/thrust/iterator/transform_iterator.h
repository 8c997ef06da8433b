// Thrust's transform iterator, as far as the kernels use it.
#pragma once
namespace thrust {
template <class I, class F> struct transform_iterator { I it; F f; auto operator[](long i) const { return f(it[i]); } };
template <class I, class F> transform_iterator<I, F> make_transform_iterator(I i, F f) { return {i, f}; }
}
