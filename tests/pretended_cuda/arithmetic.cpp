// ATen's operators on tensors of the pretended device: the CPU's, on the current stream.
//
// Shapes come from the operator's meta kernel, results out of torch's caching allocator, and the
// work reads and writes device memory when its stream comes to it. An operator without a meta
// kernel, or whose result's shape is in its data, makes the host wait first. Copies between host
// and device are torch's own. Memory is filled with rubbish when its stream has given it up.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/native/Copy.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "cudart.h"

namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using Stack = torch::jit::Stack;

// The host's view of a tensor of the device; it keeps no memory.
struct View {
  void* data;
  std::vector<int64_t> sizes, strides;
  c10::ScalarType dtype;
  bool conjugated, negated;

  explicit View(const Tensor& t)
      : data(t.data_ptr()),
        sizes(t.sizes().vec()),
        strides(t.strides().vec()),
        dtype(t.scalar_type()),
        conjugated(t.is_conj()),
        negated(t.is_neg()) {}

  Tensor get() const {
    Tensor t = at::from_blob(data, sizes, strides, at::TensorOptions(dtype));
    t._set_conj(conjugated);
    t._set_neg(negated);
    return t;
  }
};

// Replaces the tensors of a value, in lists too.
template <typename Change>
IValue with_tensors(const IValue& value, const Change& change) {
  if (value.isTensor())
    return value.toTensor().defined() ? IValue(change(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<Tensor> made;
    for (const Tensor& t : value.toTensorVector()) made.push_back(t.defined() ? change(t) : t);
    return made;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> made;
    for (const std::optional<Tensor>& t : value.toOptionalTensorList())
      made.push_back(t && t->defined() ? std::optional(change(*t)) : t);
    return made;
  }
  return value;
}

bool holds_tensors(const IValue& value) {
  return value.isTensor() || value.isTensorList() || value.isOptionalTensorList();
}

Tensor as_meta(const Tensor& t) {
  if (!t.is_cuda()) return t;
  Tensor made = at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kMeta));
  made._set_conj(t.is_conj());
  made._set_neg(t.is_neg());
  return made;
}

// A copy of a number that the host may change after the call.
Tensor as_kept(const Tensor& t) {
  Tensor made = t.clone();
  if (t.unsafeGetTensorImpl()->is_wrapped_number())
    made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

struct Below {  // neither autograd nor modes, and one thread
  at::AutoDispatchBelowADInplaceOrView below;
  at::NoGradGuard no_grad;
};

// The arguments of a call as the stream will see them.
struct Call {
  c10::OperatorHandle op;
  std::vector<IValue> arguments;         // with meta tensors for those of the device
  std::vector<std::vector<View>> views;  // of each argument, in order

  Call(const c10::OperatorHandle& op, c10::ArrayRef<IValue> given) : op(op) {
    for (const IValue& value : given) {
      auto& of_value = views.emplace_back();
      arguments.push_back(with_tensors(value, [&](const Tensor& t) {
        if (!t.is_cuda()) return as_kept(t);
        of_value.emplace_back(t);
        return at::empty({0}, at::kMeta);
      }));
    }
  }

  Stack run() const {
    Below guard;
    Stack stack;
    for (size_t i = 0; i < arguments.size(); ++i) {
      size_t next = 0;
      stack.push_back(with_tensors(
          arguments[i], [&](const Tensor& t) { return t.is_meta() ? views[i][next++].get() : t; }));
    }
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), &stack);
    return stack;
  }
};

// Of the first tensor that is on one, or the one that is asked for.
std::optional<at::Device> device_of(c10::ArrayRef<IValue> arguments) {
  std::optional<at::Device> found;
  for (const IValue& value : arguments)
    with_tensors(value, [&](const Tensor& t) {
      if (!found && t.is_cuda()) found = t.device();
      return t;
    });
  for (const IValue& value : arguments)
    if (!found && value.isDevice() && value.toDevice().is_cuda()) found = value.toDevice();
  return found && found->has_index() ? found : std::nullopt;
}

void require_one_device(const c10::OperatorHandle& op, c10::ArrayRef<IValue> arguments) {
  const auto device = device_of(arguments);
  static const std::set<std::string> mixed{"aten::index", "aten::index_put_",
                                           "aten::_index_put_impl_", "aten::_unsafe_index"};
  if (mixed.count(op.operator_name().name)) return;
  for (const IValue& value : arguments)
    with_tensors(value, [&](const Tensor& t) {
      TORCH_CHECK((t.is_cuda() && t.device() == device) || t.dim() == 0 || t.is_meta() || !device,
                  "Expected all tensors to be on the same device, but found ", *device, " and ",
                  t.device(), " in ", op.operator_name().name);
      return t;
    });
}

// Which argument a return stands for, or -1 where it is a new value.
int argument_of(const c10::FunctionSchema& schema, size_t which) {
  const auto* alias = schema.returns()[which].alias_info();
  if (!alias || !alias->isWrite()) return -1;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* of = schema.arguments()[i].alias_info();
    if (of && of->beforeSets() == alias->beforeSets()) return static_cast<int>(i);
  }
  return -1;
}

// Draws of the device's generator become draws of one of the host's with a seed out of its state.
void seed_draws(const c10::OperatorHandle& op, Stack& arguments) {
  if (!op.hasTag(at::Tag::nondeterministic_seeded)) return;
  auto generator = at::cuda::detail::getDefaultCUDAGenerator(c10::cuda::current_device());
  IValue* place = nullptr;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (op.schema().arguments()[i].type()->str().find("Generator") == std::string::npos) continue;
    place = &arguments[i];
    if (place->isGenerator()) generator = place->toGenerator();
  }
  if (!place) return;
  const std::lock_guard<std::mutex> held(generator.mutex());
  const auto [seed, offset] =
      at::check_generator<at::CUDAGeneratorImpl>(generator)->philox_engine_inputs(4);
  *place = at::detail::createCPUGenerator(seed * 0x9e3779b9u + offset);
}

// As `to_host`, the host's device in the place of the pretended one.
void move_devices(Stack& arguments, at::Device to) {
  for (IValue& value : arguments)
    if (value.isDevice()) value = to;
}

std::optional<Stack> shapes_of(const c10::OperatorHandle& op, const Stack& arguments) {
  if (!op.hasComputedKernelForDispatchKey(DispatchKey::Meta)) return std::nullopt;
  for (const auto& value : op.schema().returns())
    if (value.type()->str().find("Tensor") == std::string::npos) return std::nullopt;
  Below guard;
  Stack stack;
  for (const IValue& value : arguments) stack.push_back(with_tensors(value, as_meta));
  move_devices(stack, at::kMeta);
  try {
    op.redispatchBoxed(DispatchKeySet(DispatchKey::Meta), &stack);
  } catch (const c10::NotImplementedError&) {
    return std::nullopt;
  } catch (const c10::Error&) {
    throw;
  } catch (const std::exception&) {  // of a meta kernel in Python: it depends on data
    return std::nullopt;
  }
  return stack;
}

void wait_and_run(const c10::OperatorHandle& op, Stack& arguments, Stack* stack) {
  c10::cuda::stream_synchronize(c10::cuda::getCurrentCUDAStream().stream());
  const Stack found = Call(op, arguments).run();
  for (size_t i = 0; i < found.size(); ++i) {
    const int same = argument_of(op.schema(), i);
    if (same >= 0) {
      stack->push_back(arguments[same]);
      continue;
    }
    stack->push_back(with_tensors(found[i], [](const Tensor& t) {
      Tensor made = at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kCUDA));
      // In its turn: new memory is filled on the stream where algorithms must be deterministic.
      pretended_cuda::enqueue(c10::cuda::getCurrentCUDAStream().stream(), [to = View(made), t] {
        Below guard;
        to.get().copy_(t);
      });
      return made;
    }));
  }
}

void run_boxed(const c10::OperatorHandle& op, Stack* stack) {
  Below guard;
  const auto& schema = op.schema();
  Stack arguments(stack->end() - schema.arguments().size(), stack->end());
  torch::jit::drop(*stack, schema.arguments().size());
  const c10::cuda::OptionalCUDAGuard guard_of_device(device_of(arguments));
  require_one_device(op, arguments);
  const auto shapes = shapes_of(op, arguments);
  Stack given = arguments;
  move_devices(given, at::kCPU);
  seed_draws(op, given);
  if (!shapes) return wait_and_run(op, given, stack);

  std::vector<std::vector<View>> results(shapes->size());
  for (size_t i = 0; i < shapes->size(); ++i) {
    const int same = argument_of(schema, i);
    if (same < 0) {
      stack->push_back(with_tensors((*shapes)[i], [&](const Tensor& t) {
        Tensor made = at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kCUDA));
        results[i].emplace_back(made);
        return made;
      }));
      continue;
    }
    if (arguments[same].isTensor() && arguments[same].toTensor().is_cuda()) {
      const Tensor& out = arguments[same].toTensor();
      const Tensor& wanted = (*shapes)[i].toTensor();
      if (out.sizes() != wanted.sizes()) out.resize_(wanted.sizes());
    }
    stack->push_back(arguments[same]);
  }
  const std::string name = op.operator_name().name;
  auto work = [call = Call(op, given), results, name] {
    try {
      const Stack found = call.run();
      Below guard;
      for (size_t i = 0; i < found.size(); ++i) {
        size_t next = 0;
        if (!results[i].empty())
          with_tensors(found[i],
                       [&](const Tensor& t) { return results[i][next++].get().copy_(t); });
      }
    } catch (const std::exception& error) {
      pretended_cuda::fail((name + ": " + error.what()).c_str());
    }
  };
  pretended_cuda::enqueue(c10::cuda::getCurrentCUDAStream().stream(), work);
}

// Between host and device torch's own, within the device ours.
Tensor& copy(Tensor& self, const Tensor& source, bool non_blocking) {
  if (!self.is_cuda() || self.device() != source.device()) {
    Below guard;
    return at::native::copy_(self, source, non_blocking);
  }
  if (self.is_same(source)) return self;
  const c10::cuda::CUDAGuard guard(self.device());
  auto work = [to = View(self), from = View(source)] {
    Below guard;
    to.get().copy_(from.get());
  };
  pretended_cuda::enqueue(c10::cuda::getCurrentCUDAStream().stream(), work);
  return self;
}

std::tuple<Tensor, Tensor> dropout(const Tensor& input, double p, std::optional<bool> train) {
  if (!train.value_or(true) || p == 0)
    return {input.clone(), at::ones_like(input, at::TensorOptions(at::kBool))};
  Tensor mask = at::empty_like(input, at::TensorOptions(at::kBool)).bernoulli_(1 - p);
  return {input * mask * (p == 1 ? 0. : 1 / (1 - p)), mask};
}

int64_t choose_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                         double, bool, std::optional<double>, bool) {
  return 0;  // the one that is written in operators
}

bool is_replaced(const c10::OperatorHandle& op) {
  static const std::set<std::string> kept{
      "aten::empty",       "aten::empty_strided",     "aten::resize_",
      "aten::set_",        "aten::record_stream",     "aten::_local_scalar_dense",
      "aten::copy_",       "aten::native_dropout",    "aten::is_pinned",
      "aten::_pin_memory", "aten::_fused_sdp_choice", "aten::_efficientzerotensor"};
  const auto& name = op.operator_name();
  if (name.name.rfind("aten::", 0) != 0 || kept.count(name.name) || !op.hasSchema()) return false;
  if (!op.hasComputedKernelForDispatchKey(DispatchKey::CPU)) return false;
  for (const auto& value : op.schema().returns())
    if (value.alias_info() && !value.alias_info()->isWrite()) return false;  // a view
  return true;
}

void fill_what_is_given_up() {
  using Entry = c10::cuda::CUDACachingAllocator::TraceEntry;
  c10::cuda::CUDACachingAllocator::attachAllocatorTraceTracker([](const Entry& entry) {
    if (entry.action_ != Entry::FREE_COMPLETED) return;
    auto* const data = reinterpret_cast<void*>(entry.addr_);
    const c10::cuda::CUDAGuard guard(entry.device_);
    pretended_cuda::enqueue(entry.stream_,
                            [data, size = entry.size_] { std::memset(data, 0xfb, size); });
  });
}

}  // namespace

// Once, after CUDA has been initialised.
extern "C" void pretended_cuda_install() {
  static std::vector<c10::RegistrationHandleRAII> registered;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getRegistrationsForDispatchKey(DispatchKey::CUDA)) {
    const auto op = dispatcher.findOp(name);
    if (!op || !is_replaced(*op)) continue;
    registered.push_back(dispatcher.registerImpl(
        name, DispatchKey::CUDA, c10::KernelFunction::makeFromBoxedFunction<&run_boxed>(),
        std::nullopt, nullptr, "pretended device"));
  }
  static torch::Library library(torch::Library::IMPL, "aten", DispatchKey::CUDA, __FILE__,
                                __LINE__);
  library.impl("copy_", copy);
  library.impl("native_dropout", dropout);
  library.impl("_fused_sdp_choice", choose_attention);
  fill_what_is_given_up();
}
