// nmfx::linear_nm and nmfx::conv_nm for CPU tensors. Schemas, fakes and gradients are defined in
// nmfx/ops/*.py.
#include "binding.h"

#include <optional>
#include <string>

namespace {

using nmfx::dtype_of;
using nmfx::empty;
using nmfx::isa;
using nmfx::parallel_for;
using nmfx::ScalarType;
using nmfx::Tensor;

nmfx::Activation activation_of(const std::string& name) {
  if (name == "none") return nmfx::Activation::none;
  if (name == "relu") return nmfx::Activation::relu;
  if (name == "gelu") return nmfx::Activation::gelu;
  if (name == "gelu_tanh") return nmfx::Activation::gelu_tanh;
  if (name == "silu") return nmfx::Activation::silu;
  STD_TORCH_CHECK(false, "unknown activation ", name);
}

// A packed weight whose tensors have the shapes that (out, columns, n, m, groups) ask for.
nmfx::Weight weight_of(const Tensor& input, const Tensor& values, const Tensor& index,
                       std::optional<Tensor>& bias, int64_t out, int64_t columns, int64_t groups,
                       int64_t n, int64_t m) {
  STD_TORCH_CHECK(n >= 1 && n <= m && m <= 64 && out >= 0 && columns >= 0 && groups >= 1 &&
                      columns % m == 0,
                  "not a packed weight: ", out, " x ", columns, " at ", n, ":", m);
  nmfx::Weight w = {};
  w.dtype = dtype_of(input.scalar_type());
  w.n = int(n), w.m = int(m);
  w.out = out, w.columns = columns, w.groups = groups;
  w.blocks = (out + nmfx::kBlock - 1) / nmfx::kBlock;
  w.slots = columns / m * n;
  int64_t fields = nmfx::fields_per_word(w.m);
  w.words = (w.slots + fields - 1) / fields;
  auto fits = [&](const Tensor& t, int64_t length) {
    return t.dim() == 3 && t.size(0) == groups * w.blocks && t.size(1) == length &&
           t.size(2) == nmfx::kBlock && t.is_contiguous() && t.is_cpu();
  };
  STD_TORCH_CHECK(input.is_cpu() && fits(values, w.slots) && fits(index, w.words),
                  "the packed tensors do not fit ", out, " x ", columns, " at ", n, ":", m);
  STD_TORCH_CHECK(values.scalar_type() == input.scalar_type() &&
                      index.scalar_type() == ScalarType::Int,
                  "the packed tensors have other dtypes");
  w.values = values.const_data_ptr();
  w.index = static_cast<const uint32_t*>(index.const_data_ptr());
  if (bias) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == groups * out &&
                        bias->scalar_type() == input.scalar_type(),
                    "the bias does not fit");
    if (!bias->is_contiguous()) bias = torch::stable::contiguous(*bias);  // the caller keeps it
    w.bias = bias->const_data_ptr();
  }
  return w;
}

void run(const nmfx::Call& call) {
  if (call.weight.dtype == nmfx::DType::f64) return nmfx::run_f64(call, parallel_for);
  STD_TORCH_CHECK(nmfx::run(call, isa(), int(torch::stable::get_num_threads()), parallel_for),
                  "out of memory");
}

Tensor linear_nm(Tensor input, Tensor values, Tensor index, std::optional<Tensor> bias,
                 int64_t out_features, int64_t in_features, int64_t n, int64_t m,
                 std::string activation) {
  const int64_t dim = input.dim();
  STD_TORCH_CHECK(dim >= 1 && input.size(dim - 1) == in_features,
                  "the input does not end in in_features=", in_features);
  nmfx::Call call = {};
  call.weight =
      weight_of(input, values, index, bias, out_features, in_features, 1, n, m);
  bool plain = dim == 2 && input.stride(1) == 1;
  Tensor x = plain || input.is_contiguous() ? input : torch::stable::contiguous(input);
  std::vector<int64_t> shape(size_t(dim), out_features), strides(size_t(dim), 1);
  int64_t positions = 1, step = out_features > 1 ? out_features : 1;
  for (int64_t i = dim - 2; i >= 0; i--) {
    const int64_t size = shape[size_t(i)] = input.size(i);
    strides[size_t(i)] = step;
    positions *= size;
    step *= size > 1 ? size : 1;  // as torch's own contiguous tensors
  }
  Tensor output = empty(shape, strides, input.scalar_type());
  call.input.data = x.const_data_ptr();
  call.input.dtype = call.weight.dtype;
  call.input.positions = positions;
  call.input.row_stride = plain ? x.stride(0) : in_features;
  call.output.data = output.mutable_data_ptr();
  call.output.step_position = out_features;
  call.output.step_out = 1;
  call.output.activation = activation_of(activation);
  run(call);
  return output;
}

Tensor conv_nm(Tensor input, Tensor values, Tensor index, std::optional<Tensor> bias,
               int64_t out_channels, std::vector<int64_t> kernel_size,
               std::vector<int64_t> stride, std::vector<int64_t> padding,
               std::vector<int64_t> dilation, int64_t groups, int64_t n, int64_t m,
               std::string activation) {
  STD_TORCH_CHECK(input.dim() == 4 && kernel_size.size() == 2 && stride.size() == 2 &&
                      padding.size() == 2 && dilation.size() == 2,
                  "conv_nm takes (batch, channels, height, width) and pairs");
  STD_TORCH_CHECK(groups >= 1 && input.size(1) % groups == 0 && out_channels % groups == 0,
                  "the channels do not divide by groups=", groups);
  for (int i = 0; i < 2; i++)
    STD_TORCH_CHECK(kernel_size[i] > 0 && stride[i] > 0 && dilation[i] > 0 && padding[i] >= 0,
                    "kernel size, stride and dilation are positive, padding is not negative");
  nmfx::Call call = {};
  nmfx::Input& in = call.input;
  in.is_conv = true;
  in.channels = input.size(1) / groups;
  in.height = input.size(2), in.width = input.size(3);
  in.kernel_y = kernel_size[0], in.kernel_x = kernel_size[1];
  in.stride_y = stride[0], in.stride_x = stride[1];
  in.pad_y = padding[0], in.pad_x = padding[1];
  in.dilation_y = dilation[0], in.dilation_x = dilation[1];
  in.out_height = (in.height + 2 * in.pad_y - in.dilation_y * (in.kernel_y - 1) - 1) / in.stride_y + 1;
  in.out_width = (in.width + 2 * in.pad_x - in.dilation_x * (in.kernel_x - 1) - 1) / in.stride_x + 1;
  STD_TORCH_CHECK(in.height + 2 * in.pad_y > in.dilation_y * (in.kernel_y - 1) &&
                      in.width + 2 * in.pad_x > in.dilation_x * (in.kernel_x - 1),
                  "the kernel is larger than the padded input");
  call.weight = weight_of(input, values, index, bias, out_channels / groups,
                          in.kernel_y * in.kernel_x * in.channels, groups, n, m);
  in.data = input.const_data_ptr();
  in.dtype = call.weight.dtype;
  in.step_image = input.stride(0), in.step_channel = input.stride(1);
  in.step_y = input.stride(2), in.step_x = input.stride(3);
  in.positions = input.size(0) * in.out_height * in.out_width;
  // As torch: the result is channels-last where the input is, unless it is both.
  const bool channels_last = in.step_channel == 1 && !input.is_contiguous();
  const int64_t image = in.out_height * in.out_width;
  const int64_t pixel = channels_last ? out_channels : 1;
  Tensor output =
      empty({input.size(0), out_channels, in.out_height, in.out_width},
            {out_channels * image, channels_last ? 1 : image, in.out_width * pixel, pixel},
            input.scalar_type());
  call.output.data = output.mutable_data_ptr();
  call.output.activation = activation_of(activation);
  if (channels_last) {
    call.output.step_position = out_channels;
    call.output.step_out = 1;
  } else {
    call.output.step_position = 1;
    call.output.step_out = image;
    call.output.image_size = image;
    call.output.step_image = out_channels * image;
  }
  run(call);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmfx, CPU, m) {
  m.impl("linear_nm", TORCH_BOX(&linear_nm));
  m.impl("conv_nm", TORCH_BOX(&conv_nm));
}

// For the loader, through ctypes.
extern "C" __attribute__((visibility("default"))) const char* nmfx_isa() {
  const nmfx::Isa* isa = nmfx::isa_in_use();
  return isa ? isa->name : "";
}
extern "C" __attribute__((visibility("default"))) int nmfx_has_isa(const char* name) {
  return nmfx::isa_by_name(name) != nullptr;
}
extern "C" __attribute__((visibility("default"))) int nmfx_use_isa(const char* name) {
  return nmfx::use_isa(name);
}
