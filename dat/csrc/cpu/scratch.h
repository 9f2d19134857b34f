// Memory that is not initialised and aligned to cache lines.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace dat {

constexpr std::align_val_t kCacheLine{64};

struct FreeBytes {
  void operator()(char* bytes) const { ::operator delete[](bytes, kCacheLine); }
};
using Bytes = std::unique_ptr<char[], FreeBytes>;

inline Bytes allocate(int64_t bytes) { return Bytes(static_cast<char*>(::operator new[](bytes, kCacheLine))); }

}  // namespace dat
