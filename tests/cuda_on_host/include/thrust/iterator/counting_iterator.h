// Thrust's counting iterator, as far as the kernels use it.
#pragma once
namespace thrust {
template <class T> struct counting_iterator { T base; T operator[](long i) const { return T(base + i); } };
template <class T> counting_iterator<T> make_counting_iterator(T b) { return {b}; }
}
