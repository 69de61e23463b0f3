// The GPU: its peaks, memory on it, and time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "flexattn/types.h"

// Declared here since their header, cuda_profiler_api.h, is often not installed.
extern "C" {
cudaError_t CUDARTAPI cudaProfilerStart(void);
cudaError_t CUDARTAPI cudaProfilerStop(void);
}

namespace flexattn::bench {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// ------------------------------------------------------------------------------------------------------------ peaks

struct Peaks {
  std::string device;
  double gbs = 0, tflops = 0;  // 0: not known
  std::string how;
};

// FLOP per cycle of an SM: dense float16 products with float32 sums on tensor cores, or float32 FMA; 0 = not known.
inline int flop_per_cycle(int capability, bool tensor) {
  switch (capability) {
    case 70:
    case 75:
      return tensor ? 1024 : 128;
    case 80:
      return tensor ? 2048 : 128;
    case 86:
    case 89:
      return tensor ? 1024 : 256;
    case 90:
      return tensor ? 4096 : 256;
    default:
      return 0;
  }
}

inline Peaks peaks_of(int device, bool tensor) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "device properties");
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "device attribute");
    return value;
  };
  const double memory_ghz = attribute(cudaDevAttrMemoryClockRate) * 1e-6, ghz = attribute(cudaDevAttrClockRate) * 1e-6;
  const int bits = attribute(cudaDevAttrGlobalMemoryBusWidth), sms = properties.multiProcessorCount;
  const int flop = flop_per_cycle(10 * properties.major + properties.minor, tensor);
  Peaks peaks{properties.name, 2 * memory_ghz * bits / 8, flop * ghz * sms * 1e-3, ""};
  char text[256];
  std::snprintf(text, sizeof text,
                "2 x %.3f GHz x %d bit / 8 = %.0f GB/s; %d FLOP x %d SM x %.3f GHz = %.1f TFLOP/s (%s)", memory_ghz,
                bits, peaks.gbs, flop, sms, ghz, peaks.tflops, tensor ? "tensor cores" : "float32");
  peaks.how = text;
  return peaks;
}

// ----------------------------------------------------------------------------------------------------------- memory

class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    if (bytes) check(cudaMalloc(&data_, bytes), ("memory for " + std::to_string(bytes) + " bytes").c_str());
  }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }

  template <typename T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

template <typename T>
Buffer on_device(const std::vector<T>& values) {
  Buffer buffer(values.size() * sizeof(T));
  if (buffer.bytes())
    check(cudaMemcpy(buffer.as(), values.data(), buffer.bytes(), cudaMemcpyHostToDevice), "copy to the device");
  return buffer;
}

inline size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Normally distributed numbers. A million are drawn and repeated with an odd period, so that no two rows are alike.
inline Buffer random(int64_t count, DType dtype, unsigned seed) {
  constexpr int64_t kDrawn = (1 << 20) - 3;
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<char> drawn(std::min(count, kDrawn) * size_of(dtype));
  for (size_t i = 0; i < drawn.size() / size_of(dtype); ++i) {
    const float x = normal(generator);
    if (dtype == DType::kFloat16)
      reinterpret_cast<__half*>(drawn.data())[i] = __float2half(x);
    else if (dtype == DType::kBFloat16)
      reinterpret_cast<__nv_bfloat16*>(drawn.data())[i] = __float2bfloat16(x);
    else
      reinterpret_cast<float*>(drawn.data())[i] = x;
  }
  Buffer buffer(count * size_of(dtype));
  for (size_t at = 0; at < buffer.bytes(); at += drawn.size())
    check(cudaMemcpy(buffer.as<char>() + at, drawn.data(), std::min(drawn.size(), buffer.bytes() - at),
                     cudaMemcpyHostToDevice),
          "copy to the device");
  return buffer;
}

// ------------------------------------------------------------------------------------------------------------- time

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "event"); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { cudaEventDestroy(event_); }
  void record() { check(cudaEventRecord(event_), "event"); }
  double microseconds_since(const Event& begin) const {
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin.event_, event_), "event");
    return milliseconds * 1e3;
  }

 private:
  cudaEvent_t event_;
};

// Microseconds of every timed call, ascending. Nothing waits between calls, so that launch overhead does not count.
template <typename Call>
std::vector<double> measure(const Call& call, int64_t warmup, int64_t iterations, bool cold_l2, bool profile) {
  int device = 0, l2 = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device), "device attribute");
  const Buffer flush(cold_l2 ? 2 * static_cast<size_t>(l2) : 0);
  for (int64_t i = 0; i < warmup; ++i) call();
  check(cudaDeviceSynchronize(), "warm-up");

  std::vector<Event> begin(iterations), end(iterations);
  if (profile) check(cudaProfilerStart(), "profiler");
  for (int64_t i = 0; i < iterations; ++i) {
    if (flush.bytes()) check(cudaMemsetAsync(flush.as(), 0, flush.bytes()), "flush of the L2 cache");
    begin[i].record();
    call();
    end[i].record();
  }
  check(cudaDeviceSynchronize(), "measured calls");
  if (profile) check(cudaProfilerStop(), "profiler");
  std::vector<double> times(iterations);
  for (int64_t i = 0; i < iterations; ++i) times[i] = end[i].microseconds_since(begin[i]);
  std::sort(times.begin(), times.end());
  return times;
}

}  // namespace flexattn::bench
