// A stand-in for the vendor's header: integers that keep their width in their type, for a parser.
#pragma once

typedef long long Wide;
typedef unsigned long long Word;

template <int kBits, bool kSigned>
struct Integer {
  Wide value;
  Integer() : value(0) {}
  template <class Other>
  Integer(const Other& other) : value(Wide(other)) {}
  operator Wide() const { return value; }
  template <class Other>
  Integer& operator+=(const Other& other) {
    value += Wide(other);
    return *this;
  }
  template <class Other>
  Integer& operator-=(const Other& other) {
    value -= Wide(other);
    return *this;
  }
  template <class Other>
  Integer& operator*=(const Other& other) {
    value *= Wide(other);
    return *this;
  }
  template <class Other>
  Integer& operator|=(const Other& other) {
    value |= Wide(other);
    return *this;
  }
  template <class Other>
  Integer& operator&=(const Other& other) {
    value &= Wide(other);
    return *this;
  }
  template <class Other>
  Integer& operator^=(const Other& other) {
    value ^= Wide(other);
    return *this;
  }
  template <class Other>
  Integer& operator<<=(const Other& other) {
    value <<= int(other);
    return *this;
  }
  template <class Other>
  Integer& operator>>=(const Other& other) {
    value >>= int(other);
    return *this;
  }
  Integer& operator++() {
    ++value;
    return *this;
  }
  Integer& operator--() {
    --value;
    return *this;
  }
  Word& range(int, int) { return *reinterpret_cast<Word*>(&value); }
  Word range(int, int) const { return Word(value); }
};

template <int kBits>
using ap_int = Integer<kBits, true>;
template <int kBits>
using ap_uint = Integer<kBits, false>;
