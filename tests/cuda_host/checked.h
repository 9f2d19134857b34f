// Memory of the emulated device: every access is checked for bounds and alignment.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#define DAT_CHECKED_MEMORY

namespace checked {

[[noreturn]] void fail(const std::string& what);

// A pointer that knows the buffer it points into. It can be moved about freely but is only dereferenced through `view`.
template <typename T>
class Pointer {
 public:
  Pointer() = default;
  Pointer(std::nullptr_t) : at_(0), begin_(0), end_(0) {}
  Pointer(T* begin, int64_t count)
      : at_(reinterpret_cast<uintptr_t>(begin)), begin_(at_), end_(at_ + static_cast<uintptr_t>(count) * sizeof(T)) {}
  template <size_t kCount>
  Pointer(T (&array)[kCount]) : Pointer(array, kCount) {}
  template <typename From, typename = std::enable_if_t<std::is_same_v<const From, T> && !std::is_same_v<From, T>>>
  Pointer(const Pointer<From>& from) {
    static_assert(sizeof(*this) == sizeof(from));
    memcpy(this, &from, sizeof(*this));
  }

  Pointer operator+(int64_t count) const {
    Pointer moved = *this;
    moved.at_ += static_cast<uintptr_t>(count) * sizeof(T);
    return moved;
  }
  explicit operator bool() const { return at_ != 0; }
  bool operator!() const { return at_ == 0; }

  uintptr_t at() const { return at_; }
  uintptr_t begin() const { return begin_; }
  uintptr_t end() const { return end_; }

 private:
  uintptr_t at_, begin_, end_;
};

template <typename To>
class View : public Pointer<To> {
 public:
  explicit View(uintptr_t at, uintptr_t begin, uintptr_t end) {
    const uintptr_t fields[3] = {at, begin, end};
    static_assert(sizeof(fields) == sizeof(Pointer<To>));
    memcpy(static_cast<void*>(this), fields, sizeof(fields));
  }
  To* raw() const {
    const uintptr_t at = this->at();
    if (at < this->begin() || at + sizeof(To) > this->end() || at + sizeof(To) < at)
      fail(
          "access of " + std::to_string(sizeof(To)) + " bytes at " +
          std::to_string(static_cast<int64_t>(at - this->begin())) + " of a buffer of " +
          std::to_string(this->end() - this->begin()));
    if (at % alignof(To)) fail("access that is not aligned to " + std::to_string(alignof(To)) + " bytes");
    return reinterpret_cast<To*>(at);
  }
  operator To*() const { return raw(); }
  To& operator*() const { return *raw(); }
};

template <typename To, typename T>
View<To> view(const Pointer<T>& pointer) {
  return View<To>(pointer.at(), pointer.begin(), pointer.end());
}

template <typename T, int kCount>
class SharedArray {
 public:
  T& operator[](int i) {
    if (i < 0 || i >= kCount) fail("index " + std::to_string(i) + " of " + std::to_string(kCount) + " in shared memory");
    return items_[i];
  }

 private:
  T items_[kCount];
};

void* shared_memory_of(size_t size);

template <typename Block>
Block& shared_memory() {
  static_assert(sizeof(Block) > 0 && std::is_trivially_default_constructible_v<Block>);
  return *static_cast<Block*>(shared_memory_of(sizeof(Block)));
}

}  // namespace checked
