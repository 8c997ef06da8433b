#pragma once
namespace thrust {
template <class T> struct counting_iterator { T base; T operator[](long i) const { return T(base + i); } };
template <class T> counting_iterator<T> make_counting_iterator(T b) { return {b}; }
}
