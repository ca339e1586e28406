// What the files that register operators share: torch's stable ABI only, so that one library serves
// every torch from 2.11 on. Their checks protect memory; the Python wrappers turn them into an
// NMError that names the cause.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "kernel.h"

namespace nmfx {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body,
                         void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

inline const Isa& isa() {
  const Isa* isa = isa_in_use();
  STD_TORCH_CHECK(isa, "NMFX_CPU_ISA names an instruction set that this machine lacks");
  return *isa;
}

inline DType dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    default: STD_TORCH_CHECK(false, "N:M kernels take float16, bfloat16, float32 and float64");
  }
}

// An uninitialised CPU tensor. `torch::stable::empty` looks its operator up by name in each call,
// which took 1 us; this entry of the same stable ABI is a plain function.
inline Tensor empty(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                    ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace nmfx
