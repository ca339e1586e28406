// nmfx::sr_ste, its gradients and the select by a fixed mask for CPU tensors. Schemas, fakes and
// autograd are defined in nmfx/ops/sr_ste.py and keep.py.
#include <optional>

#include "binding.h"
#include "masks.h"
#include "pool.h"

namespace {

using nmfx::DType;
using nmfx::MaskCall;
using nmfx::ScalarType;
using nmfx::Tensor;

std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); i++) sizes.push_back(t.size(i));
  return sizes;
}
std::vector<int64_t> strides_of(const Tensor& t) {
  std::vector<int64_t> strides;
  for (int64_t i = 0; i < t.dim(); i++) strides.push_back(t.stride(i));
  return strides;
}

// Whether the elements fill their memory, each place once, in whatever order.
bool is_dense(const Tensor& t) {
  int64_t expected = 1, left = 0;
  for (int64_t i = 0; i < t.dim(); i++) left += t.size(i) != 1;
  while (left) {
    int64_t found = -1;
    for (int64_t i = 0; i < t.dim(); i++)
      if (t.size(i) != 1 && t.stride(i) == expected) found = i;
    if (found < 0) return false;
    expected *= t.size(found);
    left--;
  }
  return true;
}

bool same_places(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); i++)
    if (a.size(i) != b.size(i) || (a.size(i) != 1 && a.stride(i) != b.stride(i))) return false;
  return true;
}

// The tensor, or a copy of it that is dense, as torch.empty_like lays it out.
Tensor dense(const Tensor& t) {
  if (t.numel() == 0 || is_dense(t)) return t;
  Tensor copy = torch::stable::empty_like(t);
  return torch::stable::copy_(copy, t);
}

// Gradients live until the next step, all of them at once: up to this size malloc keeps their memory
// from step to step, and the pool, which is for what is soon given back, would not.
constexpr int64_t kPooledGradient = 32 << 20;

// An uninitialised tensor with the strides of `like`, from the pool from `pooled` bytes on.
Tensor result_like(const Tensor& like, ScalarType dtype, int64_t element_bytes,
                   int64_t pooled = nmfx::kPooled) {
  const std::vector<int64_t> sizes = sizes_of(like), strides = strides_of(like);
  const int64_t bytes = like.numel() * element_bytes;
  if (bytes < pooled) return nmfx::empty(sizes, strides, dtype);
  void* block = nmfx::pool_take(bytes);
  STD_TORCH_CHECK(block, "out of memory: ", bytes, " bytes");
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      block, int64_t(sizes.size()), sizes.data(), strides.data(), 0,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* data, void*) { nmfx::pool_give(data); }, nullptr));
  return Tensor(handle);
}

int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// A call for a dense weight, all but the other tensor.
MaskCall call_of(const Tensor& weight, const Tensor& control, int64_t m, int64_t dim) {
  STD_TORCH_CHECK(control.is_cpu() && control.scalar_type() == ScalarType::Double &&
                      control.numel() == 2 && control.is_contiguous(),
                  "control is a float64 tensor [lambda_W, N]");
  const double* values = static_cast<const double*>(control.const_data_ptr());
  STD_TORCH_CHECK(values[1] >= 1 && values[1] <= double(m) && m <= 64, "N:M of ", values[1], ":",
                  m, " is outside 1 <= N <= M <= 64");
  const int64_t rank = weight.dim();
  STD_TORCH_CHECK(dim >= -rank && dim < rank, "dim=", dim, " of a tensor with ", rank);
  dim = dim < 0 ? dim + rank : dim;
  STD_TORCH_CHECK(weight.is_cpu() && weight.size(dim) % m == 0, "size ", weight.size(dim),
                  " of dim ", dim, " is not a multiple of ", m);
  MaskCall call = {};
  call.weight = weight.const_data_ptr();
  call.weight_type = call.other_type = nmfx::dtype_of(weight.scalar_type());
  call.n = int(values[1]), call.m = int(m);
  call.columns = weight.size(dim);
  call.inner = call.columns == 1 ? 1 : weight.stride(dim);
  call.outer = weight.numel() / (call.columns * call.inner);
  call.lambda = values[0];
  return call;
}

struct Job {
  const MaskCall* call;
  const nmfx::MaskKernels* kernels;
};

void run(const MaskCall& call) {
  Job job = {&call, nmfx::isa().masks};
  int64_t elements = 1;
  const int64_t items = job.kernels->items(call, &elements);
  constexpr int64_t kPiece = 32768;  // elements that are worth another thread, as torch has it
  nmfx::parallel_for(
      0, items, (kPiece + elements - 1) / elements,
      [](int64_t begin, int64_t end, void* context) {
        const Job& job = *static_cast<const Job*>(context);
        job.kernels->run(*job.call, begin, end);
      },
      &job);
}

Tensor sr_ste_project(Tensor weight, Tensor control, int64_t m, int64_t dim,
                      std::optional<ScalarType> dtype) {
  const Tensor w = dense(weight);
  const ScalarType wanted = dtype ? *dtype : w.scalar_type();
  const DType to = nmfx::dtype_of(wanted), from = nmfx::dtype_of(w.scalar_type());
  STD_TORCH_CHECK(to == from || (from == DType::f32 && to != DType::f64),
                  "sr_ste narrows float32 to float16 or bfloat16, and nothing else");
  Tensor out = result_like(w, wanted, bytes_of(to));
  if (w.numel() == 0) return out;
  MaskCall call = call_of(w, control, m, dim);
  call.other_type = to;
  call.out = out.mutable_data_ptr();
  run(call);
  return out;
}

Tensor sr_ste(Tensor weight, Tensor control, int64_t m, int64_t dim, int64_t,
              std::optional<ScalarType> dtype) {
  return sr_ste_project(weight, control, m, dim, dtype);
}

bool takes_gradient(const Tensor& grad, const Tensor& weight) {
  const ScalarType g = grad.scalar_type(), w = weight.scalar_type();
  return g == w || (w == ScalarType::Float && (g == ScalarType::Half || g == ScalarType::BFloat16));
}

Tensor sr_ste_backward(Tensor grad, Tensor weight, Tensor control, int64_t m, int64_t dim,
                       int64_t) {
  const Tensor w = dense(weight);
  const int64_t bytes = bytes_of(nmfx::dtype_of(w.scalar_type()));
  Tensor out = result_like(w, w.scalar_type(), bytes, kPooledGradient);
  if (w.numel() == 0) return out;
  MaskCall call = call_of(w, control, m, dim);
  STD_TORCH_CHECK(grad.is_cpu(), "the gradient is on another device than the weight");
  call.out = out.mutable_data_ptr();
  if (takes_gradient(grad, w) && same_places(grad, w)) {
    call.grad = grad.const_data_ptr();
    call.other_type = nmfx::dtype_of(grad.scalar_type());
  } else {
    torch::stable::copy_(out, grad);  // refuses another shape
    call.grad = call.out;
  }
  run(call);
  return out;
}

void sr_ste_decay_(Tensor grad, Tensor weight, Tensor control, int64_t m, int64_t dim, int64_t abi) {
  if (weight.numel() == 0) return;
  const Tensor w = dense(weight);
  MaskCall call = call_of(w, control, m, dim);
  STD_TORCH_CHECK(grad.is_cpu(), "the gradient is on another device than the weight");
  if (call.lambda == 0) return;
  if (grad.scalar_type() != w.scalar_type() || !same_places(grad, w)) {
    torch::stable::copy_(grad, sr_ste_backward(grad, w, control, m, dim, abi));
    return;
  }
  call.grad = call.out = grad.mutable_data_ptr();
  run(call);
}

// `weight` where `mask` is set, +0 elsewhere, from one dense tensor into another of its layout.
void keep_into(void* out, DType to, const Tensor& weight, const Tensor& mask) {
  STD_TORCH_CHECK(mask.is_cpu() && mask.scalar_type() == ScalarType::Bool,
                  "the mask is a bool tensor on the CPU");
  Tensor laid_out = mask;
  if (!same_places(mask, weight)) {
    laid_out = nmfx::empty(sizes_of(weight), strides_of(weight), ScalarType::Bool);
    torch::stable::copy_(laid_out, mask);  // refuses another shape
  }
  MaskCall call = {};
  call.weight = weight.const_data_ptr();
  call.weight_type = nmfx::dtype_of(weight.scalar_type());
  call.kept = static_cast<const bool*>(laid_out.const_data_ptr());
  call.other_type = to;
  call.out = out;
  call.n = call.m = 1;
  call.outer = call.inner = 1, call.columns = weight.numel();
  run(call);
}

Tensor keep_project(Tensor weight, Tensor mask, std::optional<ScalarType> dtype) {
  const Tensor w = dense(weight);
  const ScalarType wanted = dtype ? *dtype : w.scalar_type();
  const DType to = nmfx::dtype_of(wanted), from = nmfx::dtype_of(w.scalar_type());
  STD_TORCH_CHECK(w.is_cpu() && (to == from || (from == DType::f32 && to != DType::f64)),
                  "keep narrows float32 to float16 or bfloat16, and nothing else");
  Tensor out = result_like(w, wanted, bytes_of(to));
  if (w.numel()) keep_into(out.mutable_data_ptr(), to, w, mask);
  return out;
}

void keep_(Tensor grad, Tensor mask) {
  if (grad.numel() == 0) return;
  STD_TORCH_CHECK(grad.is_cpu(), "the gradient is on another device than the mask");
  if (!is_dense(grad)) {
    torch::stable::copy_(grad, keep_project(grad, mask, std::nullopt));
    return;
  }
  keep_into(grad.mutable_data_ptr(), nmfx::dtype_of(grad.scalar_type()), grad, mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmfx, CPU, m) {
  m.impl("keep_project", TORCH_BOX(&keep_project));
  m.impl("keep_", TORCH_BOX(&keep_));
  m.impl("sr_ste", TORCH_BOX(&sr_ste));
  m.impl("sr_ste_project", TORCH_BOX(&sr_ste_project));
  m.impl("sr_ste_backward", TORCH_BOX(&sr_ste_backward));
  m.impl("sr_ste_gradient", TORCH_BOX(&sr_ste_backward));
  m.impl("sr_ste_decay_", TORCH_BOX(&sr_ste_decay_));
}
