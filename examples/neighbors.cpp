// SPDX-License-Identifier: MIT
// The k nearest keys of each query and their weighted sum, without Python and without PyTorch: on
// the CPU, and on a CUDA device if there is one; with compute capability 9.0, by the kernels for
// Hopper, in float16. All are compared with a simple loop.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <numeric>
#include <vector>

#include "cpu/operators.h"
#include "params.h"
#ifdef WITH_CUDA
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>

#include "cuda/hopper.h"
#include "cuda/operators.h"
#endif

namespace {

using namespace convnn;

constexpr int64_t kQueries = 5, kKeys = 12, kColumns = 16, kChannels = 3, kNeighbors = 3;

struct Tokens {
  std::vector<float> query, key, value;
};
struct Results {
  std::vector<float> similarities = std::vector<float>(kQueries * kNeighbors);
  std::vector<int64_t> indices = std::vector<int64_t>(kQueries * kNeighbors);
  std::vector<float> output = std::vector<float>(kQueries * kChannels);
};

// Small integers, so that dot products are exact.
std::vector<float> numbers(int64_t count, int step) {
  std::vector<float> result;
  for (int64_t i = 0; i < count; ++i) result.push_back(float(int(i * step % 7) - 3));
  return result;
}

SelectParams select_params(const void* query, const void* key, float* similarities,
                           int64_t* indices) {
  SelectParams p = {};
  p.batch = 1, p.n = kQueries, p.m = kKeys, p.d = kColumns, p.k = kNeighbors;
  p.dtype = DType::float32, p.metric = Metric::dot, p.order = Order::similarity;
  p.query = dense_rows(query, kQueries, kColumns), p.key = dense_rows(key, kKeys, kColumns);
  p.similarities = similarities, p.indices = indices;
  return p;
}

AggregateParams aggregate_params(const void* value, const float* similarities,
                                 const int64_t* indices, void* output) {
  AggregateParams p = {};
  p.batch = 1, p.n = kQueries, p.m = kKeys, p.c = p.o = kChannels, p.k = kNeighbors;
  p.dtype = p.similarity_dtype = DType::float32;
  p.convolution = Convolution::none, p.rho = Rho::softmax, p.scale = 1;
  p.value = dense_rows(value, kKeys, kChannels);
  p.similarities = similarities, p.indices = indices, p.output = output;
  return p;
}

void in_one_thread(int64_t tasks, int64_t, const cpu::Body& body) { body(0, tasks); }

Results on_cpu(const Tokens& x) {
  Results r;
  cpu::select(select_params(x.query.data(), x.key.data(), r.similarities.data(), r.indices.data()),
              in_one_thread);
  cpu::aggregate(
      aggregate_params(x.value.data(), r.similarities.data(), r.indices.data(), r.output.data()),
      in_one_thread);
  return r;
}

// The same from the definition: all similarities, sorted; softmax; weighted sum.
Results expected(const Tokens& x) {
  Results r;
  for (size_t i = 0; i < kQueries; ++i) {
    std::vector<double> s(kKeys);
    for (size_t j = 0; j < kKeys; ++j) {
      for (size_t d = 0; d < kColumns; ++d) {
        s[j] += double(x.query[i * kColumns + d]) * double(x.key[j * kColumns + d]);
      }
    }
    std::vector<size_t> nearest(kKeys);
    std::iota(nearest.begin(), nearest.end(), size_t(0));
    std::stable_sort(nearest.begin(), nearest.end(),
                     [&](size_t a, size_t b) { return s[a] > s[b]; });
    double sum = 0;
    for (size_t j = 0; j < kNeighbors; ++j) sum += std::exp(s[nearest[j]] - s[nearest[0]]);
    for (size_t j = 0; j < kNeighbors; ++j) {
      const double rho = std::exp(s[nearest[j]] - s[nearest[0]]) / sum;
      r.similarities[i * kNeighbors + j] = float(s[nearest[j]]);
      r.indices[i * kNeighbors + j] = int64_t(nearest[j]);
      for (size_t c = 0; c < kChannels; ++c) {
        r.output[i * kChannels + c] += float(rho * double(x.value[nearest[j] * kChannels + c]));
      }
    }
  }
  return r;
}

// Reports results that differ from the expected ones. Outputs may differ in rounding.
bool agree(const char* where, const Results& r, const Results& expected, float rounding = 1e-5f) {
  bool same = r.indices == expected.indices && r.similarities == expected.similarities;
  if (!same) std::fprintf(stderr, "%s chose other neighbors than expected\n", where);
  for (size_t i = 0; i < r.output.size(); ++i) {
    if (!(std::fabs(r.output[i] - expected.output[i]) <= rounding)) {
      std::fprintf(stderr, "%s gave %g for output %d, expected %g\n", where, double(r.output[i]),
                   int(i), double(expected.output[i]));
      same = false;
    }
  }
  return same;
}

#ifdef WITH_CUDA
void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Device memory, freed by the destructor.
class DeviceMemory : public cuda::Context {
 public:
  DeviceMemory() : Context(nullptr) {}
  ~DeviceMemory() override {
    for (void* memory : all_) cudaFree(memory);
  }
  void* allocate(size_t bytes) override {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes));
    all_.push_back(memory);
    return memory;
  }
  template <class T>
  T* of(const std::vector<T>& values) {
    T* memory = static_cast<T*>(allocate(values.size() * sizeof(T)));
    check(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return memory;
  }

 private:
  std::vector<void*> all_;
};

template <class T>
void fetch(std::vector<T>& values, const T* memory) {
  check(cudaMemcpy(values.data(), memory, values.size() * sizeof(T), cudaMemcpyDeviceToHost));
}

Results on_cuda(const Tokens& x) {
  Results r;
  DeviceMemory device;
  float* similarities = device.of(r.similarities);
  int64_t* indices = device.of(r.indices);
  float* output = device.of(r.output);
  cuda::select(select_params(device.of(x.query), device.of(x.key), similarities, indices), device);
  cuda::aggregate(aggregate_params(device.of(x.value), similarities, indices, output), device);
  fetch(r.similarities, similarities);
  fetch(r.indices, indices);
  fetch(r.output, output);
  return r;
}

std::vector<__half> halves(const std::vector<float>& numbers) {
  std::vector<__half> result;
  for (const float x : numbers) result.push_back(__float2half(x));
  return result;
}

// Selection and weighted sum in one call, which takes numbers of 16 bits.
Results on_hopper(const Tokens& x) {
  Results r;
  DeviceMemory device;
  std::vector<__half> output(r.output.size());
  float* similarities = device.of(r.similarities);
  int64_t* indices = device.of(r.indices);
  __half* sums = device.of(output);
  SelectParams select =
      select_params(device.of(halves(x.query)), device.of(halves(x.key)), similarities, indices);
  AggregateParams aggregate =
      aggregate_params(device.of(halves(x.value)), similarities, indices, sums);
  select.dtype = aggregate.dtype = DType::float16;
  if (const char* reason = cuda::hopper_refuses(select, &aggregate))
    throw std::runtime_error(reason);
  cuda::hopper_forward(select, &aggregate, device);
  fetch(r.similarities, similarities);
  fetch(r.indices, indices);
  fetch(output, sums);
  for (size_t i = 0; i < output.size(); ++i) r.output[i] = __half2float(output[i]);
  return r;
}

bool has_device() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
}

// Whether the kernels for Hopper were built and can run.
bool is_hopper() {
#ifdef WITH_HOPPER
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
  return major == 9 && minor == 0;
#else
  return false;
#endif
}
#endif

void print(const char* where, const Results& r) {
  std::printf("%s\n", where);
  for (int64_t i = 0; i < kQueries; ++i) {
    std::printf("  query %d:", int(i));
    for (int64_t j = i * kNeighbors; j < (i + 1) * kNeighbors; ++j) {
      std::printf("  key %2d (%g)", int(r.indices[size_t(j)]), double(r.similarities[size_t(j)]));
    }
    std::printf("  ->");
    for (int64_t c = i * kChannels; c < (i + 1) * kChannels; ++c) {
      std::printf(" %8.5f", double(r.output[size_t(c)]));
    }
    std::printf("\n");
  }
}

}  // namespace

int main() {
  try {
    const Tokens tokens = {numbers(kQueries * kColumns, 3), numbers(kKeys * kColumns, 5),
                           numbers(kKeys * kChannels, 2)};
    const Results right = expected(tokens);
    const Results cpu = on_cpu(tokens);
    print("cpu", cpu);
    bool same = agree("cpu", cpu, right);
#ifdef WITH_CUDA
    if (has_device()) {
      const Results cuda = on_cuda(tokens);
      print("cuda", cuda);
      same = agree("cuda", cuda, right) && same;
      if (is_hopper()) {
        const Results hopper = on_hopper(tokens);
        print("cuda, kernels for Hopper", hopper);
        // An output of float16 has 11 bits.
        same = agree("the kernels for Hopper", hopper, right, 4e-3f) && same;
      }
      return same ? 0 : 1;
    }
#endif
    std::printf("cuda: no device, or built without\n");
    return same ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
