// SPDX-License-Identifier: MIT
// Prints what the host code of csrc/cuda launches for a call, as a line of JSON for each launch. It
// runs nothing, and no pointer is to memory. tools/predict_cuda.py builds it, and names kernels by
// their addresses, "at".
//
//   plan select|forward|forward_backward batch=64 n=4096 m=4096 d=64 c=64 k=9 dtype=bfloat16
//
// step and splits, if given, are those of hopper.h.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <string>

#include "../../csrc/cuda/hopper.h"
#include "../../csrc/cuda/operators.h"
#include "execution.h"

namespace {

using namespace convnn;

// Addresses as aligned as those of an allocator, far apart.
class NoMemory : public cuda::Context {
 public:
  NoMemory() : Context(nullptr) {}
  void* allocate(size_t) override { return next(); }
  void* next() { return reinterpret_cast<void*>(at_ += intptr_t(1) << 36); }

 private:
  intptr_t at_ = 0;
};

const std::map<std::string, DType> kTypes = {{"float64", DType::float64},
                                             {"float32", DType::float32},
                                             {"float16", DType::float16},
                                             {"bfloat16", DType::bfloat16}};

struct Call {
  std::map<std::string, int64_t> numbers;
  DType dtype = DType::bfloat16;
  NoMemory memory;

  int64_t operator[](const char* name) const { return numbers.at(name); }
};

SelectParams select_params(Call& call) {
  SelectParams p = {};
  p.batch = call["batch"], p.n = call["n"], p.m = call["m"], p.d = call["d"], p.k = call["k"];
  p.dtype = call.dtype;
  p.query = dense_rows(call.memory.next(), p.n, p.d);
  p.key = dense_rows(call.memory.next(), p.m, p.d);
  p.similarities = call.memory.next();
  p.indices = static_cast<int64_t*>(call.memory.next());
  return p;
}

// Depthwise, by a softmax, of the neighbors that a selection finds.
AggregateParams aggregate_params(const SelectParams& select, Call& call) {
  AggregateParams p = {};
  p.batch = select.batch, p.n = select.n, p.m = select.m, p.k = select.k;
  p.c = p.o = call["c"];
  p.dtype = select.dtype, p.similarity_dtype = DType::float32;
  p.convolution = Convolution::depthwise, p.scale = 1;
  p.value = dense_rows(call.memory.next(), p.m, p.c);
  p.similarities = select.similarities, p.indices = select.indices;
  p.weight = call.memory.next(), p.output = call.memory.next();
  return p;
}

void select_and_aggregate(const SelectParams& p, const AggregateParams* aggregate, Call& call) {
  if (cuda::hopper_refuses(p, aggregate)) {
    cuda::select(p, call.memory);
    if (aggregate) cuda::aggregate(*aggregate, call.memory);
    return;
  }
  cuda::HopperChoices choices;
  choices.multiprocessors = 132;
  if (call.numbers.count("step")) choices.step = int(call["step"]);
  if (call.numbers.count("splits")) choices.splits = int(call["splits"]);
  cuda::hopper_forward(p, aggregate, call.memory, choices);
}

void select(Call& call) { select_and_aggregate(select_params(call), nullptr, call); }

void forward(Call& call) {
  const SelectParams p = select_params(call);
  const AggregateParams aggregate = aggregate_params(p, call);
  select_and_aggregate(p, &aggregate, call);
}

// The backward alone.
void forward_backward(Call& call) {
  const SelectParams select = select_params(call);
  ForwardBackwardParams p = {};
  p.aggregate.forward = aggregate_params(select, call);
  p.aggregate.forward.output = nullptr;
  p.aggregate.grad_output = call.memory.next(), p.aggregate.grad_value = call.memory.next();
  p.aggregate.grad_weight = call.memory.next();
  SelectBackwardParams& s = p.select;
  s.batch = select.batch, s.n = select.n, s.m = select.m, s.d = select.d, s.k = select.k;
  s.dtype = select.dtype, s.query = select.query, s.key = select.key;
  s.similarities = select.similarities, s.indices = select.indices;
  s.grad_query = call.memory.next(), s.grad_key = call.memory.next();
  cuda::forward_backward(p, call.memory);
}

bool is_first = true;

}  // namespace

namespace execution {

void planned(const char* name, intptr_t address, int64_t blocks, int threads, size_t shared_bytes) {
  std::printf(
      "%s{\"kernel\": \"%s\", \"at\": %lld, \"blocks\": %lld, \"threads\": %d, \"shared\": %zu",
      is_first ? "" : "}\n", name, static_cast<long long>(address), static_cast<long long>(blocks),
      threads, shared_bytes);
  is_first = false;
}

void number(const char* name, int64_t value) {
  std::printf(", \"%s\": %lld", name, static_cast<long long>(value));
}

void number(size_t place, int64_t value) {
  number(("argument" + std::to_string(place)).c_str(), value);
}

TensorMap map_rows(const void*, int64_t, int64_t, int64_t, int) { return {}; }

}  // namespace execution

int main(int argc, char** argv) {
  const std::map<std::string, void (*)(Call&)> operators = {
      {"select", select}, {"forward", forward}, {"forward_backward", forward_backward}};
  Call call;
  for (int i = 2; i < argc; ++i) {
    const std::string name(argv[i], std::strcspn(argv[i], "="));
    const char* value = argv[i] + name.size() + 1;
    if (name == "dtype")
      call.dtype = kTypes.at(value);
    else
      call.numbers[name] = std::atoll(value);
  }
  try {
    operators.at(argv[1])(call);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  if (!is_first) std::printf("}\n");
}
