// The Gated DeltaNet operators as torch operators: schemas, argument checks, allocation, dispatch.
//
// Built on torch's stable ABI, so that one library serves several versions of torch and of Python.
// All checks of arguments are here; the functions of gdn.h trust what they are given. On CPUs the
// values of slots and tables are checked too; on CUDA that would wait for the device, and there a
// slot outside the pool is padding.
//
// CORTEX_OPS_NAMESPACE  the operators' namespace, `cortex` unless given
// CORTEX_WITH_CUDA      the CUDA launchers are linked in
// CORTEX_HOST_CUDA      the CUDA launchers are compiled for the host (csrc/host) and serve CPU tensors

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "gdn.h"
#ifndef CORTEX_HOST_CUDA
#include "cpu/dispatch.h"
#endif

#ifndef CORTEX_OPS_NAMESPACE
#define CORTEX_OPS_NAMESPACE cortex
#endif
#if defined(CORTEX_WITH_CUDA) || defined(CORTEX_HOST_CUDA)
#define CORTEX_HAS_LAUNCHERS
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::initializer_list<int64_t>;

constexpr int64_t kAny = -1;

// Parts of messages. They are put into words only where a check fails: every call makes dozens of
// checks. No iostreams, which crash where a compiler links its own C++ library into this one.
struct Shaped {
    const Shape& sizes;
};
struct SizesOf {
    const Tensor& tensor;
};
struct StridesOf {
    const Tensor& tensor;
};

template <class Sizes>
std::string text_of_sizes(const Sizes& sizes) {
    std::string text = "(";
    const char* comma = "";
    for (int64_t size : sizes) {
        text += comma;
        text += size == kAny ? std::string("*") : std::to_string(size);
        comma = ", ";
    }
    return text + ")";
}

std::string text_of(const char* text) {
    return text;
}
std::string text_of(int64_t number) {
    return std::to_string(number);
}
std::string text_of(Shaped shape) {
    return text_of_sizes(shape.sizes);
}
std::string text_of(SizesOf of) {
    return text_of_sizes(of.tensor.sizes());
}
std::string text_of(StridesOf of) {
    return text_of_sizes(of.tensor.strides());
}
std::string text_of(ScalarType type) {
    switch (type) {
        case ScalarType::Float:
            return "torch.float32";
        case ScalarType::Half:
            return "torch.float16";
        case ScalarType::BFloat16:
            return "torch.bfloat16";
        case ScalarType::Double:
            return "torch.float64";
        case ScalarType::Long:
            return "torch.int64";
        case ScalarType::Int:
            return "torch.int32";
        case ScalarType::Byte:
            return "torch.uint8";
        case ScalarType::Bool:
            return "torch.bool";
        default:
            return "dtype " + std::to_string(static_cast<int>(type));
    }
}

// Checks the arguments of one call of one operator; every message begins with its name.
class Arguments {
  public:
    Arguments(const char* op, const Tensor& first)
        : op_(op), is_cuda_(first.is_cuda()), index_(first.get_device_index()) {}

    template <class... Parts>
    void require(bool holds, const Parts&... parts) const {
        if (holds) return;
        std::string text = op_;
        text += ": ";
        ((text += text_of(parts)), ...);
        throw std::runtime_error(text);
    }

    // The shape (kAny matches all) and the device.
    void shaped(const Tensor& t, const char* name, Shape shape) const {
        bool same = t.dim() == static_cast<int64_t>(shape.size());
        if (same) {
            int64_t i = 0;
            for (int64_t size : shape) same &= size == kAny || size == t.size(i), ++i;
        }
        require(same, name, " must be ", Shaped{shape}, ", got ", SizesOf{t});
        require(t.is_cuda() == is_cuda_ && t.get_device_index() == index_, name,
                " is on another device than the first argument");
    }

    void typed(const Tensor& t, const char* name, ScalarType type) const {
        require(t.scalar_type() == type, name, " must be ", type, ", got ", t.scalar_type());
    }

    // A dense tensor of one type.
    void dense(const Tensor& t, const char* name, Shape shape, ScalarType type) const {
        shaped(t, name, shape);
        typed(t, name, type);
        require(t.is_contiguous(), name, " must be contiguous, got strides ", StridesOf{t});
    }

    // A tensor whose tokens (the first `token_dims` dimensions) may lie apart; returns the elements
    // from one token to the next.
    int64_t strided(const Tensor& t, const char* name, Shape shape, ScalarType type,
                    int64_t token_dims = 1) const {
        shaped(t, name, shape);
        typed(t, name, type);
        int64_t dense = 1;
        for (int64_t i = t.dim() - 1; i >= token_dims; --i) {
            require(t.size(i) == 1 || t.stride(i) == dense, name,
                    " must be dense but for its tokens, got strides ", StridesOf{t});
            dense *= t.size(i);
        }
        int64_t stride = dense;
        if (t.numel() == 0) return stride;
        for (int64_t i = token_dims - 1, tokens = 1; i >= 0; --i) {
            if (t.size(i) != 1) {
                if (tokens == 1) stride = t.stride(i);
                require(t.stride(i) == stride * tokens, name,
                        " must have its tokens evenly apart, got strides ", StridesOf{t});
                tokens *= t.size(i);
            }
        }
        return stride;
    }

    // One of the element types of inputs.
    int32_t input_type(const Tensor& t, const char* name) const {
        switch (t.scalar_type()) {
            case ScalarType::Float:
                return kGdnFloat32;
            case ScalarType::Half:
                return kGdnFloat16;
            case ScalarType::BFloat16:
                return kGdnBFloat16;
            default:
                require(false, name, " must be float32, float16 or bfloat16, got ",
                        t.scalar_type());
                return -1;
        }
    }

    // A pool of states (slots, v_heads, v_dim, k_dim), or snapshots of the same sizes.
    int32_t state_type(const Tensor& states) const {
        require(states.dim() == 4, "states must be (slots, v_heads, v_dim, k_dim), got ",
                SizesOf{states});
        require(states.is_contiguous(), "states must be contiguous, got strides ",
                StridesOf{states});
        ScalarType type = states.scalar_type();
        require(type == ScalarType::Float || type == ScalarType::BFloat16,
                "states must be float32 or bfloat16, got ", type);
        for (int64_t i : {2, 3}) {
            require(states.size(i) >= 1 && states.size(i) <= kGdnMaxHeadDim,
                    "head dims go from 1 to ", int64_t{kGdnMaxHeadDim}, ", states are ",
                    SizesOf{states});
        }
        shaped(states, "states", {kAny, kAny, kAny, kAny});
        return type == ScalarType::Float ? kGdnFloat32 : kGdnBFloat16;
    }

    int32_t heads(int64_t k_heads, int64_t v_heads) const {
        require(k_heads >= 1 && v_heads >= 1 && v_heads % k_heads == 0, v_heads,
                " value heads are no multiple of ", k_heads, " key heads");
        return static_cast<int32_t>(k_heads);
    }

    // The pool's slot of each of the sequences.
    void slots(const Tensor& slots, int64_t num_sequences, int64_t num_slots) const {
        dense(slots, "slots", {num_sequences}, ScalarType::Long);
        if (!checks_values()) return;
        const auto* each = static_cast<const int64_t*>(slots.const_data_ptr());
        std::vector<bool> taken(static_cast<size_t>(num_slots));
        for (int64_t i = 0; i < num_sequences; ++i) {
            int64_t slot = each[i];
            require(slot >= -1 && slot < num_slots, "slot ", slot, " is outside the pool of ",
                    num_slots);
            if (slot < 0) continue;
            require(!taken[static_cast<size_t>(slot)], "slot ", slot, " is given twice");
            taken[static_cast<size_t>(slot)] = true;
        }
    }

    // Where sequences start among the tokens; returns the number of sequences.
    void starts(const std::optional<Tensor>& starts, int64_t num_sequences,
                int64_t num_tokens) const {
        if (!starts.has_value()) {
            require(num_sequences > 0 ? num_tokens % num_sequences == 0 : num_tokens == 0,
                    num_tokens, " tokens are not ", num_sequences, " sequences of one length");
            return;
        }
        dense(*starts, "starts", {num_sequences + 1}, ScalarType::Long);
        if (!checks_values()) return;
        const auto* each = static_cast<const int64_t*>(starts->const_data_ptr());
        bool ascends = each[0] == 0 && each[num_sequences] == num_tokens;
        for (int64_t i = 0; i < num_sequences; ++i) ascends &= each[i] <= each[i + 1];
        require(ascends, "starts must ascend from 0 to the ", num_tokens, " tokens");
    }

    bool checks_values() const {
#ifdef CORTEX_HOST_CUDA
        return false;
#else
        return !is_cuda_;
#endif
    }

    const char* op() const { return op_; }
    bool is_cuda() const { return is_cuda_; }
    int32_t device_index() const { return index_; }

  private:
    const char* op_;
    bool is_cuda_;
    int32_t index_;
};

const void* in(const Tensor& t) {
    return t.const_data_ptr();
}

template <class T>
const T* in(const Tensor& t) {
    return static_cast<const T*>(t.const_data_ptr());
}

template <class T = void>
T* in_out(const Tensor& t) {
    return static_cast<T*>(t.mutable_data_ptr());
}

#ifdef CORTEX_WITH_CUDA
// torch's current stream of a device. The symbol is looked up when first needed: a torch without
// CUDA lacks it and loads this library all the same.
void* current_stream(int32_t device) {
    using Getter = AOTITorchError (*)(int32_t, void**);
    static const Getter getter = [] {
        const char* name = "aoti_torch_get_current_cuda_stream";
        void* symbol = dlsym(RTLD_DEFAULT, name);
        if (symbol == nullptr) {
            // Linked by torch's own libraries, but not in the global scope.
            void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
            if (library != nullptr) symbol = dlsym(library, name);
        }
        return reinterpret_cast<Getter>(symbol);
    }();
    void* stream = nullptr;
    if (getter == nullptr || getter(device, &stream) != AOTI_TORCH_SUCCESS) {
        throw std::runtime_error("this torch does not tell its current CUDA stream");
    }
    return stream;
}
#endif

// An operator's functions; null where it is not built.
template <class Args>
struct Functions {
    int (*on_cpu)(const Args*);
    int (*on_cuda)(const Args*, void*);
};

// Runs an operator's function for the device of its arguments.
template <class Args>
void run(const Arguments& given, Functions<Args> functions, const Args& args) {
    int code = 0;
#if defined(CORTEX_HOST_CUDA)
    code = functions.on_cuda(&args, nullptr);
#elif defined(CORTEX_WITH_CUDA)
    if (given.is_cuda()) {
        torch::stable::accelerator::DeviceGuard guard(given.device_index());
        code = functions.on_cuda(&args, current_stream(given.device_index()));
    } else {
        code = functions.on_cpu(&args);
    }
#else
    code = functions.on_cpu(&args);
#endif
#ifdef CORTEX_HAS_LAUNCHERS
    given.require(code == 0, code == 0 ? "" : gdn_cuda_error_text(code));
#else
    given.require(code == 0, "failed with code ", code);
#endif
}

#if defined(CORTEX_HOST_CUDA)
#define GDN_FUNCTIONS(op) {nullptr, gdn_cuda_##op}
#elif defined(CORTEX_WITH_CUDA)
#define GDN_FUNCTIONS(op) {gdn_cpu_##op, gdn_cuda_##op}
#else
#define GDN_FUNCTIONS(op) {gdn_cpu_##op, nullptr}
#endif

GdnRule rule_arguments(const Arguments& given, const Tensor& q, const Tensor& k, const Tensor& v,
                       const Tensor& g, const Tensor& beta, const Tensor& states,
                       const Tensor& slots, const std::optional<Tensor>& starts,
                       const Tensor& out) {
    GdnRule args{};
    args.dtype = given.input_type(v, "v");
    args.state_dtype = given.state_type(states);
    const ScalarType type = v.scalar_type();
    const int64_t num_slots = states.size(0), v_heads = states.size(1);
    const int64_t v_dim = states.size(2), k_dim = states.size(3);
    given.shaped(k, "k", {kAny, kAny, k_dim});
    const int64_t tokens = k.size(0), k_heads = k.size(1);
    args.num_k_heads = given.heads(k_heads, v_heads);
    args.q_stride = given.strided(q, "q", {tokens, k_heads, k_dim}, type);
    args.k_stride = given.strided(k, "k", {tokens, k_heads, k_dim}, type);
    args.v_stride = given.strided(v, "v", {tokens, v_heads, v_dim}, type);
    given.dense(g, "g", {tokens, v_heads}, ScalarType::Float);
    given.dense(beta, "beta", {tokens, v_heads}, ScalarType::Float);
    given.shaped(slots, "slots", {kAny});
    given.slots(slots, slots.size(0), num_slots);
    given.starts(starts, slots.size(0), tokens);
    args.q = in(q), args.k = in(k), args.v = in(v);
    args.g = in<float>(g), args.beta = in<float>(beta);
    args.states = in_out(states);
    args.slots = in<int64_t>(slots);
    args.starts = starts.has_value() ? in<int64_t>(*starts) : nullptr;
    args.out = in_out(out);
    args.num_tokens = tokens, args.num_sequences = slots.size(0), args.num_slots = num_slots;
    args.num_v_heads = static_cast<int32_t>(v_heads);
    args.k_dim = static_cast<int32_t>(k_dim), args.v_dim = static_cast<int32_t>(v_dim);
    return args;
}

Tensor gated_delta_rule_recurrence(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta,
                                   Tensor states, Tensor slots, std::optional<Tensor> starts) {
    const Arguments given("gated_delta_rule_recurrence", q);
    Tensor out = torch::stable::new_empty(v, v.sizes());
    GdnRule args = rule_arguments(given, q, k, v, g, beta, states, slots, starts, out);
    run<GdnRule>(given, GDN_FUNCTIONS(gated_delta_rule_recurrence), args);
    return out;
}

Tensor chunked_gated_delta_rule_recurrence(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta,
                                           Tensor states, Tensor slots,
                                           std::optional<Tensor> starts) {
    const Arguments given("chunked_gated_delta_rule_recurrence", q);
    Tensor out = torch::stable::new_empty(v, v.sizes());
    GdnRule args = rule_arguments(given, q, k, v, g, beta, states, slots, starts, out);
    run<GdnRule>(given, GDN_FUNCTIONS(chunked_gated_delta_rule_recurrence), args);
    return out;
}

GdnConv conv_arguments(const Arguments& given, const Tensor& x, const Tensor& weight,
                       const Tensor& windows, const Tensor& slots,
                       const std::optional<Tensor>& starts, const Tensor& out) {
    GdnConv args{};
    args.dtype = given.input_type(x, "x");
    const ScalarType type = x.scalar_type();
    given.shaped(x, "x", {kAny, kAny});
    const int64_t channels = x.size(1);
    args.x_stride = given.strided(x, "x", {kAny, channels}, type);
    given.dense(weight, "weight", {channels, kAny}, type);
    const int64_t width = weight.size(1);
    given.require(width >= 2 && width <= kGdnMaxConvWidth, "weight has ", width, " taps; 2 to ",
                  int64_t{kGdnMaxConvWidth}, " are served");
    given.dense(windows, "windows", {kAny, width - 1, channels}, type);
    given.shaped(slots, "slots", {kAny});
    given.slots(slots, slots.size(0), windows.size(0));
    given.starts(starts, slots.size(0), x.size(0));
    args.x = in(x), args.weight = in(weight), args.windows = in_out(windows);
    args.slots = in<int64_t>(slots);
    args.starts = starts.has_value() ? in<int64_t>(*starts) : nullptr;
    args.out = in_out(out);
    args.num_tokens = x.size(0), args.num_sequences = slots.size(0);
    args.num_slots = windows.size(0), args.num_channels = channels;
    args.width = static_cast<int32_t>(width);
    return args;
}

Tensor causal_conv1d_update(Tensor x, Tensor weight, Tensor windows, Tensor slots) {
    const Arguments given("causal_conv1d_update", x);
    Tensor out = torch::stable::new_empty(x, x.sizes());
    GdnConv args = conv_arguments(given, x, weight, windows, slots, std::nullopt, out);
    given.require(args.num_tokens == args.num_sequences, args.num_tokens, " tokens for ",
                  args.num_sequences, " slots");
    run<GdnConv>(given, GDN_FUNCTIONS(causal_conv1d_update), args);
    return out;
}

Tensor causal_conv1d_full(Tensor x, Tensor weight, Tensor windows, Tensor slots,
                          std::optional<Tensor> starts) {
    const Arguments given("causal_conv1d_full", x);
    Tensor out = torch::stable::new_empty(x, x.sizes());
    GdnConv args = conv_arguments(given, x, weight, windows, slots, starts, out);
    run<GdnConv>(given, GDN_FUNCTIONS(causal_conv1d_full), args);
    return out;
}

std::tuple<Tensor, Tensor> fused_gdn_gating(Tensor b, Tensor a, Tensor a_log, Tensor dt_bias) {
    const Arguments given("fused_gdn_gating", b);
    GdnGating args{};
    args.dtype = given.input_type(b, "b");
    given.shaped(b, "b", {kAny, kAny});
    const int64_t tokens = b.size(0), heads = b.size(1);
    args.b_stride = given.strided(b, "b", {tokens, heads}, b.scalar_type());
    args.a_stride = given.strided(a, "a", {tokens, heads}, b.scalar_type());
    given.dense(a_log, "a_log", {heads}, ScalarType::Float);
    given.dense(dt_bias, "dt_bias", {heads}, ScalarType::Float);
    Tensor beta = torch::stable::new_empty(b, {tokens, heads}, ScalarType::Float);
    Tensor g = torch::stable::new_empty(b, {tokens, heads}, ScalarType::Float);
    args.b = in(b), args.a = in(a);
    args.a_log = in<float>(a_log), args.dt_bias = in<float>(dt_bias);
    args.beta = in_out<float>(beta), args.g = in_out<float>(g);
    args.num_tokens = tokens, args.num_v_heads = static_cast<int32_t>(heads);
    run<GdnGating>(given, GDN_FUNCTIONS(fused_gdn_gating), args);
    return {beta, g};
}

Tensor gdn_gated_norm(Tensor x, Tensor gate, Tensor weight, double eps) {
    const Arguments given("gdn_gated_norm", x);
    GdnNorm args{};
    args.dtype = given.input_type(x, "x");
    given.dense(x, "x", {kAny, kAny, kAny}, x.scalar_type());
    const int64_t tokens = x.size(0), heads = x.size(1), v_dim = x.size(2);
    given.require(v_dim >= 1 && v_dim <= kGdnMaxHeadDim, "head dims go from 1 to ",
                  int64_t{kGdnMaxHeadDim}, ", x is ", SizesOf{x});
    args.gate_stride = given.strided(gate, "gate", {tokens, heads, v_dim}, x.scalar_type());
    given.dense(weight, "weight", {v_dim}, ScalarType::Float);
    Tensor out = torch::stable::new_empty(x, x.sizes());
    args.x = in(x), args.gate = in(gate), args.weight = in<float>(weight), args.out = in_out(out);
    args.num_tokens = tokens, args.eps = static_cast<float>(eps);
    args.num_v_heads = static_cast<int32_t>(heads), args.v_dim = static_cast<int32_t>(v_dim);
    run<GdnNorm>(given, GDN_FUNCTIONS(gdn_gated_norm), args);
    return out;
}

// What gdn_decode_step and gdn_verify share; `draft` is the dimension of draft tokens, if any.
GdnStep step_arguments(const Arguments& given, const Tensor& mixed, const Tensor& z,
                       const Tensor& b, const Tensor& a, const Tensor& conv_weight,
                       const Tensor& a_log, const Tensor& dt_bias, const Tensor& norm_weight,
                       double norm_eps, const Tensor& windows, const Tensor& states,
                       const Tensor& slots, const Tensor& arrivals, std::optional<int64_t> draft) {
    GdnStep args{};
    args.dtype = given.input_type(mixed, "mixed");
    args.state_dtype = given.state_type(states);
    const ScalarType type = mixed.scalar_type();
    const int64_t num_slots = states.size(0), v_heads = states.size(1);
    const int64_t v_dim = states.size(2), k_dim = states.size(3);
    const int64_t rows = mixed.size(0), conv_dim = mixed.size(mixed.dim() - 1);
    const int64_t qk_dim = conv_dim - v_heads * v_dim;
    given.require(qk_dim > 0 && qk_dim % (2 * k_dim) == 0, "mixed has ", conv_dim,
                  " channels, which are not key heads for states of ", SizesOf{states});
    args.num_k_heads = given.heads(qk_dim / (2 * k_dim), v_heads);
    if (draft.has_value()) {
        const int64_t t = *draft;
        args.mixed_stride = given.strided(mixed, "mixed", {rows, t, conv_dim}, type, 2);
        args.z_stride = given.strided(z, "z", {rows, t, v_heads * v_dim}, type, 2);
        args.b_stride = given.strided(b, "b", {rows, t, v_heads}, type, 2);
        args.a_stride = given.strided(a, "a", {rows, t, v_heads}, type, 2);
    } else {
        args.mixed_stride = given.strided(mixed, "mixed", {rows, conv_dim}, type);
        args.z_stride = given.strided(z, "z", {rows, v_heads * v_dim}, type);
        args.b_stride = given.strided(b, "b", {rows, v_heads}, type);
        args.a_stride = given.strided(a, "a", {rows, v_heads}, type);
    }
    given.dense(conv_weight, "conv_weight", {conv_dim, kAny}, type);
    const int64_t width = conv_weight.size(1);
    given.require(width >= 2 && width <= kGdnMaxConvWidth, "conv_weight has ", width,
                  " taps; 2 to ", int64_t{kGdnMaxConvWidth}, " are served");
    given.dense(a_log, "a_log", {v_heads}, ScalarType::Float);
    given.dense(dt_bias, "dt_bias", {v_heads}, ScalarType::Float);
    given.dense(norm_weight, "norm_weight", {v_dim}, ScalarType::Float);
    given.dense(windows, "windows", {num_slots, width - 1, conv_dim}, type);
    given.slots(slots, rows, num_slots);
    given.dense(arrivals, "arrivals", {kAny}, ScalarType::Int);
    given.require(arrivals.size(0) >= rows * args.num_k_heads, "arrivals must hold at least ",
                  rows * args.num_k_heads, ", got ", arrivals.size(0));
    args.mixed = in(mixed), args.z = in(z), args.b = in(b), args.a = in(a);
    args.conv_weight = in(conv_weight);
    args.a_log = in<float>(a_log), args.dt_bias = in<float>(dt_bias);
    args.norm_weight = in<float>(norm_weight), args.norm_eps = static_cast<float>(norm_eps);
    args.windows = in_out(windows), args.states = in_out(states);
    args.slots = in<int64_t>(slots), args.arrivals = in_out<int32_t>(arrivals);
    args.num_sequences = rows, args.num_slots = num_slots;
    args.num_v_heads = static_cast<int32_t>(v_heads);
    args.k_dim = static_cast<int32_t>(k_dim), args.v_dim = static_cast<int32_t>(v_dim);
    args.width = static_cast<int32_t>(width);
    return args;
}

Tensor gdn_decode_step(Tensor mixed, Tensor z, Tensor b, Tensor a, Tensor conv_weight, Tensor a_log,
                       Tensor dt_bias, Tensor norm_weight, double norm_eps, Tensor windows,
                       Tensor states, Tensor slots, Tensor arrivals) {
    const Arguments given("gdn_decode_step", mixed);
    given.shaped(mixed, "mixed", {kAny, kAny});
    GdnStep args = step_arguments(given, mixed, z, b, a, conv_weight, a_log, dt_bias, norm_weight,
                                  norm_eps, windows, states, slots, arrivals, std::nullopt);
    args.num_draft = 1;
    Tensor out = torch::stable::new_empty(mixed, z.sizes());
    args.out = in_out(out);
    run<GdnStep>(given, GDN_FUNCTIONS(gdn_decode_step), args);
    return out;
}

Tensor gdn_verify(Tensor mixed, Tensor z, Tensor b, Tensor a, Tensor conv_weight, Tensor a_log,
                  Tensor dt_bias, Tensor norm_weight, double norm_eps, Tensor windows,
                  Tensor states, Tensor slots, Tensor pending, Tensor ring_inputs, Tensor ring_keys,
                  Tensor ring_deltas, Tensor ring_decays, Tensor arrivals) {
    const Arguments given("gdn_verify", mixed);
    given.shaped(mixed, "mixed", {kAny, kAny, kAny});
    const int64_t draft = mixed.size(1);
    GdnStep args = step_arguments(given, mixed, z, b, a, conv_weight, a_log, dt_bias, norm_weight,
                                  norm_eps, windows, states, slots, arrivals, draft);
    const int64_t num_slots = states.size(0), v_heads = states.size(1);
    given.shaped(ring_inputs, "ring_inputs", {num_slots, kAny, mixed.size(2)});
    const int64_t max_draft = ring_inputs.size(1);
    given.require(draft <= max_draft && max_draft <= kGdnMaxDraftTokens, draft,
                  " draft tokens in a ring of ", max_draft, "; at most ",
                  int64_t{kGdnMaxDraftTokens}, " are served");
    given.dense(ring_inputs, "ring_inputs", {num_slots, max_draft, mixed.size(2)},
                mixed.scalar_type());
    given.dense(ring_keys, "ring_keys", {num_slots, max_draft, v_heads, states.size(3)},
                ScalarType::Float);
    given.dense(ring_deltas, "ring_deltas", {num_slots, max_draft, v_heads, states.size(2)},
                ScalarType::Float);
    given.dense(ring_decays, "ring_decays", {num_slots, max_draft, v_heads}, ScalarType::Float);
    given.dense(pending, "pending", {mixed.size(0)}, ScalarType::Long);
    Tensor out = torch::stable::new_empty(mixed, z.sizes());
    args.out = in_out(out);
    args.pending = in<int64_t>(pending);
    args.ring_inputs = in_out(ring_inputs), args.ring_keys = in_out<float>(ring_keys);
    args.ring_deltas = in_out<float>(ring_deltas), args.ring_decays = in_out<float>(ring_decays);
    args.num_draft = static_cast<int32_t>(draft);
    args.max_draft = static_cast<int32_t>(max_draft);
    run<GdnStep>(given, GDN_FUNCTIONS(gdn_verify), args);
    return out;
}

// The tables of a prefill on a CPU: every token of every sequence in one chunk, in order.
void check_tables(const Arguments& given, const GdnRule& args) {
    int64_t token = 0;
    given.require(
        args.first_chunks[0] == 0 && args.first_chunks[args.num_sequences] == args.num_chunks,
        "first_chunks must go from 0 to the ", args.num_chunks, " chunks");
    for (int64_t sequence = 0; sequence < args.num_sequences; ++sequence) {
        for (int64_t c = args.first_chunks[sequence]; c < args.first_chunks[sequence + 1]; ++c) {
            given.require(c >= 0 && c < args.num_chunks, "first_chunks names chunk ", c, " of ",
                          args.num_chunks);
            const int32_t* chunk = args.chunks + 4 * c;
            given.require(chunk[0] == token && chunk[1] >= 1 && chunk[1] <= kGdnChunkTokens &&
                              chunk[2] == sequence,
                          "chunk ", c, " is (", chunk[0], ", ", chunk[1], ", ", chunk[2], ", ",
                          chunk[3], ") where token ", token, " of sequence ", sequence,
                          " comes next");
            given.require(chunk[3] >= -1 && chunk[3] < args.num_snapshots, "chunk ", c,
                          " names snapshot ", chunk[3], " of ", args.num_snapshots);
            token += chunk[1];
        }
    }
    given.require(token == args.num_tokens, "the chunks hold ", token, " tokens of ",
                  args.num_tokens);
}

Tensor gdn_prefill(Tensor qkv, Tensor g, Tensor beta, Tensor states, Tensor slots, Tensor chunks,
                   Tensor first_chunks, Tensor segments, std::optional<Tensor> snapshots) {
    const Arguments given("gdn_prefill", qkv);
    GdnRule args{};
    args.dtype = given.input_type(qkv, "qkv");
    args.state_dtype = given.state_type(states);
    given.shaped(qkv, "qkv", {kAny, kAny});
    const int64_t tokens = qkv.size(0), conv_dim = qkv.size(1);
    const int64_t v_heads = states.size(1), v_dim = states.size(2), k_dim = states.size(3);
    const int64_t stride = given.strided(qkv, "qkv", {tokens, conv_dim}, qkv.scalar_type());
    const int64_t qk_dim = conv_dim - v_heads * v_dim;
    given.require(qk_dim > 0 && qk_dim % (2 * k_dim) == 0, "qkv has ", conv_dim,
                  " channels, which are not key heads for states of ", SizesOf{states});
    given.require(tokens <= std::numeric_limits<int32_t>::max(), "too many tokens: ", tokens);
    args.num_k_heads = given.heads(qk_dim / (2 * k_dim), v_heads);
    given.dense(g, "g", {tokens, v_heads}, ScalarType::Float);
    given.dense(beta, "beta", {tokens, v_heads}, ScalarType::Float);
    given.shaped(slots, "slots", {kAny});
    const int64_t num_sequences = slots.size(0);
    given.slots(slots, num_sequences, states.size(0));
    given.dense(chunks, "chunks", {kAny, 4}, ScalarType::Int);
    given.dense(first_chunks, "first_chunks", {num_sequences + 1}, ScalarType::Int);
    given.dense(segments, "segments", {kAny, 4}, ScalarType::Int);
    given.require(segments.size(0) >= num_sequences, segments.size(0), " segments for ",
                  num_sequences, " sequences");
    if (snapshots.has_value()) {
        given.dense(*snapshots, "snapshots", {kAny, v_heads, v_dim, k_dim}, states.scalar_type());
        args.snapshots = in_out(*snapshots), args.num_snapshots = snapshots->size(0);
    }
    Tensor out = torch::stable::new_empty(qkv, {tokens, v_heads, v_dim});
    const int64_t element = static_cast<int64_t>(qkv.element_size());
    const char* base = in<char>(qkv);
    args.q = base, args.k = base + element * (qk_dim / 2), args.v = base + element * qk_dim;
    args.q_stride = args.k_stride = args.v_stride = stride;
    args.g = in<float>(g), args.beta = in<float>(beta);
    args.states = in_out(states), args.slots = in<int64_t>(slots), args.out = in_out(out);
    args.num_tokens = tokens, args.num_sequences = num_sequences;
    args.num_slots = states.size(0);
    args.num_v_heads = static_cast<int32_t>(v_heads);
    args.k_dim = static_cast<int32_t>(k_dim), args.v_dim = static_cast<int32_t>(v_dim);
    args.chunks = in<int32_t>(chunks), args.first_chunks = in<int32_t>(first_chunks);
    args.segments = in<int32_t>(segments);
    args.num_chunks = chunks.size(0), args.num_segments = segments.size(0);
    if (given.checks_values()) check_tables(given, args);
#ifdef CORTEX_HAS_LAUNCHERS
    std::optional<Tensor> workspace;
#ifndef CORTEX_HOST_CUDA
    if (given.is_cuda())
#endif
    {
        workspace =
            torch::stable::new_empty(qkv, {gdn_cuda_prefill_workspace(&args)}, ScalarType::Byte);
        args.workspace = in_out(*workspace);
    }
#endif
    run<GdnRule>(given, GDN_FUNCTIONS(gdn_prefill), args);
    return out;
}

#ifndef CORTEX_HOST_CUDA
// The CPU instruction set that the operators use: "avx512", "avx2" or "baseline".
std::string cpu_capability() {
    return gdn_cpu_capability();
}

// Chooses another one, the empty name the best; false where the machine lacks it. For tests.
bool set_cpu_capability(std::string name) {
    return gdn_cpu_set_capability(name.empty() ? nullptr : name.c_str()) == 0;
}
#endif

}  // namespace

// Names of macros are expanded on their way through a macro of our own.
#define GDN_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define GDN_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

GDN_LIBRARY(CORTEX_OPS_NAMESPACE, m) {
    m.def(
        "gated_delta_rule_recurrence(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, "
        "Tensor(a!) states, Tensor slots, Tensor? starts=None) -> Tensor");
    m.def(
        "chunked_gated_delta_rule_recurrence(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, "
        "Tensor(a!) states, Tensor slots, Tensor? starts=None) -> Tensor");
    m.def(
        "causal_conv1d_update(Tensor x, Tensor weight, Tensor(a!) windows, Tensor slots) "
        "-> Tensor");
    m.def(
        "causal_conv1d_full(Tensor x, Tensor weight, Tensor(a!) windows, Tensor slots, "
        "Tensor? starts=None) -> Tensor");
    m.def("fused_gdn_gating(Tensor b, Tensor a, Tensor a_log, Tensor dt_bias) -> (Tensor, Tensor)");
    m.def("gdn_gated_norm(Tensor x, Tensor gate, Tensor weight, float eps) -> Tensor");
    m.def(
        "gdn_decode_step(Tensor mixed, Tensor z, Tensor b, Tensor a, Tensor conv_weight, "
        "Tensor a_log, Tensor dt_bias, Tensor norm_weight, float norm_eps, Tensor(a!) windows, "
        "Tensor(b!) states, Tensor slots, Tensor(c!) arrivals) -> Tensor");
    m.def(
        "gdn_prefill(Tensor qkv, Tensor g, Tensor beta, Tensor(a!) states, Tensor slots, "
        "Tensor chunks, Tensor first_chunks, Tensor segments, Tensor(b!)? snapshots=None) "
        "-> Tensor");
    m.def(
        "gdn_verify(Tensor mixed, Tensor z, Tensor b, Tensor a, Tensor conv_weight, Tensor a_log, "
        "Tensor dt_bias, Tensor norm_weight, float norm_eps, Tensor(a!) windows, "
        "Tensor(b!) states, Tensor slots, Tensor pending, Tensor(c!) ring_inputs, "
        "Tensor(d!) ring_keys, Tensor(e!) ring_deltas, Tensor(f!) ring_decays, "
        "Tensor(g!) arrivals) -> Tensor");
#ifndef CORTEX_HOST_CUDA
    m.def("cpu_capability() -> str");
    m.def("set_cpu_capability(str name) -> bool");
#endif
}

#define GDN_IMPLEMENTATIONS(m)                                                      \
    m.impl("gated_delta_rule_recurrence", TORCH_BOX(&gated_delta_rule_recurrence)); \
    m.impl("chunked_gated_delta_rule_recurrence",                                   \
           TORCH_BOX(&chunked_gated_delta_rule_recurrence));                        \
    m.impl("causal_conv1d_update", TORCH_BOX(&causal_conv1d_update));               \
    m.impl("causal_conv1d_full", TORCH_BOX(&causal_conv1d_full));                   \
    m.impl("fused_gdn_gating", TORCH_BOX(&fused_gdn_gating));                       \
    m.impl("gdn_gated_norm", TORCH_BOX(&gdn_gated_norm));                           \
    m.impl("gdn_decode_step", TORCH_BOX(&gdn_decode_step));                         \
    m.impl("gdn_prefill", TORCH_BOX(&gdn_prefill));                                 \
    m.impl("gdn_verify", TORCH_BOX(&gdn_verify))

GDN_LIBRARY_IMPL(CORTEX_OPS_NAMESPACE, CPU, m) {
    GDN_IMPLEMENTATIONS(m);
}

#ifdef CORTEX_WITH_CUDA
GDN_LIBRARY_IMPL(CORTEX_OPS_NAMESPACE, CUDA, m) {
    GDN_IMPLEMENTATIONS(m);
}
#endif

#ifndef CORTEX_HOST_CUDA
GDN_LIBRARY_IMPL(CORTEX_OPS_NAMESPACE, CompositeExplicitAutograd, m) {
    m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
    m.impl("set_cpu_capability", TORCH_BOX(&set_cpu_capability));
}
#endif
