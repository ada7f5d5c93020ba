// SPDX-License-Identifier: MIT
// Runs operators on the host execution layer for tests/host_cuda_program.py: reads calls from
// standard input and writes results to standard output. A call is an operator's number, a seed, 24
// numbers (the last is the limit of the workspace), the scale, the input buffers, and the sizes of
// the output buffers. A buffer is its size, -1 for null, and its contents. All numbers have 64
// bits. Each buffer is allocated separately, so that AddressSanitizer detects accesses outside it;
// outputs and workspace are filled with 0xFF bytes.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/hopper.h"
#include "../../csrc/cuda/hopper_dense.h"
#include "hopper.h"

namespace {

using namespace convnn;

constexpr size_t kNumbers = 24;

class HostMemory : public cuda::Context {
 public:
  HostMemory() : Context(nullptr) {}
  ~HostMemory() { execution::forget_memory(); }
  void* allocate(size_t bytes) override {
    void* memory = allocate_input(bytes);
    execution::written_by_kernels(memory, bytes);
    return memory;
  }
  void* allocate_input(size_t bytes) {
    void* memory = std::malloc(bytes);
    if (!memory) std::abort();
    std::memset(memory, 0xFF, bytes);
    memory_.emplace_back(memory, std::free);
    return memory;
  }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> memory_;
};

template <class T>
bool read(T* values, size_t count) {
  return std::fread(values, sizeof(T), count, stdin) == count;
}
int64_t read_number() {
  int64_t number = 0;
  if (!read(&number, 1)) std::abort();
  return number;
}

struct Buffer {
  void* data = nullptr;
  int64_t bytes = -1;

  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

struct Call {
  int64_t numbers[kNumbers];
  double scale = 1;
  HostMemory memory;
  std::vector<Buffer> inputs, outputs;

  void read_rest() {
    if (!read(numbers, kNumbers) || !read(&scale, 1)) std::abort();
    memory.most_bytes = numbers[kNumbers - 1];
    const int64_t input_count = read_number();
    for (int64_t i = 0; i < input_count; ++i) {
      Buffer buffer = {nullptr, read_number()};
      if (buffer.bytes >= 0) buffer.data = memory.allocate_input(size_t(buffer.bytes));
      if (buffer.bytes > 0 && !read(static_cast<char*>(buffer.data), size_t(buffer.bytes))) {
        std::abort();
      }
      inputs.push_back(buffer);
    }
    const int64_t output_count = read_number();
    for (int64_t i = 0; i < output_count; ++i) outputs.push_back(make(read_number()));
  }
  // The key at `input`, or the query before it if that is null.
  const void* key(size_t input) const {
    return inputs[input].bytes < 0 ? inputs[input - 1].data : inputs[input].data;
  }
  Buffer make(int64_t bytes) {
    return {bytes < 0 ? nullptr : memory.allocate(size_t(bytes)), bytes};
  }
};

// The numbers, inputs and outputs that select() and the forwards have first.
SelectParams select_params(const Call& call) {
  const int64_t* n = call.numbers;
  SelectParams p = {};
  p.batch = n[0], p.n = n[1], p.m = n[2], p.d = n[3], p.k = n[4], p.r = n[5];
  p.dtype = DType(n[6]), p.metric = Metric(n[7]), p.order = Order(n[8]);
  p.candidates_stride = n[9], p.self_stride = n[10], p.range_stride = n[11];
  p.exclude_self = n[12] != 0;
  p.query = dense_rows(call.inputs[0].data, p.n, p.d);
  p.key = dense_rows(call.key(1), p.m, p.d);
  p.candidates = call.inputs[2].as<int64_t>();
  p.self_indices = call.inputs[3].as<int64_t>();
  p.key_mask = call.inputs[4].as<uint8_t>();
  p.key_range = call.inputs[5].as<int64_t>();
  p.similarities = call.outputs[0].data;
  p.indices = static_cast<int64_t*>(call.outputs[1].data);
  return p;
}

void select(Call& call) { cuda::select(select_params(call), call.memory); }

void select_backward(Call& call) {
  const int64_t* n = call.numbers;
  SelectBackwardParams p = {};
  p.batch = n[0], p.n = n[1], p.m = n[2], p.d = n[3], p.k = n[4];
  p.dtype = DType(n[5]), p.metric = Metric(n[6]);
  p.grad_similarities = call.inputs[0].data;
  p.query = dense_rows(call.inputs[1].data, p.n, p.d);
  p.key = dense_rows(call.key(2), p.m, p.d);
  p.similarities = call.inputs[3].data, p.indices = call.inputs[4].as<int64_t>();
  p.grad_query = call.outputs[0].data, p.grad_key = call.outputs[1].data;
  cuda::select_backward(p, call.memory);
}

// Inputs from `first`: value, similarities, indices, weight.
AggregateParams aggregate_params(const Call& call, size_t first) {
  const int64_t* n = call.numbers;
  AggregateParams p = {};
  p.batch = n[0], p.n = n[1], p.m = n[2], p.c = n[3], p.o = n[4], p.k = n[5];
  p.dtype = DType(n[6]), p.similarity_dtype = DType(n[7]);
  p.convolution = Convolution(n[8]), p.rho = Rho(n[9]), p.scale = call.scale;
  p.value = dense_rows(call.inputs[first].data, p.m, p.c);
  p.similarities = call.inputs[first + 1].data;
  p.indices = call.inputs[first + 2].as<int64_t>(), p.weight = call.inputs[first + 3].data;
  return p;
}

void aggregate(Call& call) {
  AggregateParams p = aggregate_params(call, 0);
  p.bias = call.inputs[4].data, p.output = call.outputs[0].data;
  cuda::aggregate(p, call.memory);
}

void aggregate_backward(Call& call) {
  AggregateBackwardParams p = {};
  p.forward = aggregate_params(call, 1);
  p.grad_output = call.inputs[0].data;
  p.grad_value = call.outputs[0].data, p.grad_similarities = call.outputs[1].data;
  p.grad_weight = call.outputs[2].data, p.grad_bias = call.outputs[3].data;
  cuda::aggregate_backward(p, call.memory);
}

void forward_backward(Call& call) {
  const int64_t* n = call.numbers;
  ForwardBackwardParams p = {};
  AggregateParams& f = p.aggregate.forward;
  SelectBackwardParams& s = p.select;
  f.batch = s.batch = n[0], f.n = s.n = n[1], f.m = s.m = n[2], s.d = n[3], f.c = n[4], f.o = n[5];
  f.k = s.k = n[6];
  s.dtype = DType(n[7]), f.dtype = DType(n[8]), f.similarity_dtype = DType(n[9]);
  f.convolution = Convolution(n[10]), f.rho = Rho(n[11]), f.scale = call.scale;
  s.metric = Metric(n[12]);
  p.aggregate.grad_output = call.inputs[0].data, s.grad_similarities = call.inputs[1].data;
  s.query = dense_rows(call.inputs[2].data, s.n, s.d);
  s.key = dense_rows(call.key(3), s.m, s.d);
  f.value = dense_rows(call.inputs[4].data, f.m, f.c), f.weight = call.inputs[5].data;
  f.similarities = s.similarities = call.inputs[6].data;
  f.indices = s.indices = call.inputs[7].as<int64_t>();
  s.grad_query = call.outputs[0].data, s.grad_key = call.outputs[1].data;
  p.aggregate.grad_value = call.outputs[2].data, p.aggregate.grad_weight = call.outputs[3].data;
  p.aggregate.grad_bias = call.outputs[4].data;
  cuda::forward_backward(p, call.memory);
}

// Its numbers are those of select(); the columns of value or -1, outputs, convolution, rho and the
// type of value; the multiprocessors, splits and step to use; and which sweep: 0 for Hopper, 1 the
// portable one, 2 whatever the forward of a device without a sweep of its own takes.
void hopper_forward(Call& call) {
  const int64_t* n = call.numbers;
  const SelectParams p = select_params(call);
  AggregateParams a = {};
  a.batch = p.batch, a.n = p.n, a.m = p.m, a.c = n[13], a.o = n[14], a.k = p.k;
  a.dtype = DType(n[17]), a.similarity_dtype = DType::float32;
  a.convolution = Convolution(n[15]), a.rho = Rho(n[16]), a.scale = call.scale;
  a.value = dense_rows(call.inputs[6].data, a.m, a.c);
  a.similarities = p.similarities, a.indices = p.indices;
  a.weight = call.inputs[7].data, a.bias = call.inputs[8].data, a.output = call.outputs[2].data;
  const AggregateParams* aggregate = n[13] < 0 ? nullptr : &a;
  if (n[21] == 2) return cuda::forward(p, a, call.memory);
  if (const char* reason = cuda::hopper_refuses(p, aggregate)) {
    throw std::runtime_error(std::string("refused: ") + reason);
  }
  cuda::HopperChoices choices;
  choices.multiprocessors = int(n[18]), choices.splits = int(n[19]), choices.step = int(n[20]);
  choices.portable = n[21] != 0;
  cuda::hopper_forward(p, aggregate, call.memory, choices);
}

// Its numbers are those of aggregate(), and the multiprocessors to use.
void hopper_aggregate_dense(Call& call) {
  AggregateParams p = aggregate_params(call, 0);
  p.bias = call.inputs[4].data, p.output = call.outputs[0].data;
  if (const char* reason = cuda::hopper_dense_refuses(p)) {
    throw std::runtime_error(std::string("refused: ") + reason);
  }
  cuda::hopper_aggregate_dense(p, call.memory, int(call.numbers[10]));
}

}  // namespace

int main() {
  void (*const operators[])(Call&) = {
      select,         select_backward,       aggregate, aggregate_backward, forward_backward,
      hopper_forward, hopper_aggregate_dense};
  for (int64_t number = 0; read(&number, 1);) {
    execution::seed(uint64_t(read_number()));
    Call call;
    call.read_rest();
    try {
      operators[number](call);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      return 1;
    }
    for (const Buffer& output : call.outputs) {
      if (output.bytes > 0) std::fwrite(output.data, 1, size_t(output.bytes), stdout);
    }
    std::fflush(stdout);
  }
  const auto origin = reinterpret_cast<intptr_t>(&execution::seed);
  for (const auto& [kernel, launches] : execution::launched()) {
    const auto& [address, name] = kernel;
    std::printf("%lld %s %zu %lld %lld\n", static_cast<long long>(address - origin), name.c_str(),
                launches.most_shared_bytes, static_cast<long long>(launches.count),
                static_cast<long long>(launches.collectives));
  }
}
