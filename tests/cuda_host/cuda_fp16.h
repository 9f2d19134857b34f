// CUDA's half precision on the host: conversions only, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u, fraction = x.bits & 1023u;
  float magnitude;
  if (exponent == 0) {
    magnitude = static_cast<float>(fraction) / 16777216.0f;
  } else {
    const uint32_t wide = (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13;
    memcpy(&magnitude, &wide, sizeof(wide));
  }
  return sign ? -magnitude : magnitude;
}

inline __half __float2half_rn(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  // Below the smallest normal number the unit is 2**-24; adding 0.5 rounds to that by the float's own unit.
  if (bits < 0x38800000u) {
    float magnitude;
    memcpy(&magnitude, &bits, sizeof(bits));
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, sizeof(bits));
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  const uint32_t rounded = bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}
