// Cards for machines that have none: torch's own CUDA dispatch key, with the CPU's kernels behind it.
//
// A fallback answers every operation on tensors of a card: it refuses what CUDA refuses, lets the CPU's kernel run in the
// same memory, and gives the results back as tensors of that card. Allocators, a device guard and hooks are what torch
// asks a backend for. stand_in.py is told of allocations, of waits of the host, and of weights that are read back.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

using at::Tensor;
using c10::Device, c10::DeviceIndex, c10::IValue, c10::Storage;
using Stack = torch::jit::Stack;

constexpr int CARDS = 2;
static const Device HOST(c10::kCPU);
static thread_local DeviceIndex current = 0;

static Device card(DeviceIndex number) { return Device(c10::kCUDA, number < 0 ? current : number); }

// --- What stand_in.py hears of. It may not be called while the ledger is locked, as it takes Python's lock. ---

static void (*happened)(const char*) = nullptr;  // a wait of the host, or weights that it reads

static void tell(const std::string& what) {
  if (happened) happened(what.c_str());
}

// --- Memory: who holds what, and how much of it there is. ---

struct Block {
  int64_t bytes;
  DeviceIndex number;
  bool is_weight;  // or what was made of a whole weight, value by value
};
static std::recursive_mutex ledger;
using Lock = std::lock_guard<std::recursive_mutex>;
static std::unordered_map<const void*, Block> blocks;
static std::map<const char*, size_t> pinned;  // begin -> bytes
static int64_t live[CARDS] = {}, capacity[CARDS] = {};
static int64_t peak = 0;  // most live bytes of a card

static void release(void* begin) {
  Lock lock(ledger);
  auto block = blocks.find(begin);
  live[block->second.number] -= block->second.bytes;
  blocks.erase(block);
  free(begin);
}

static c10::DataPtr allocate_on(Device device, size_t asked) {
  if (asked == 0) return {nullptr, nullptr, &release, device};
  int64_t bytes = (asked + 511) / 512 * 512;  // as CUDA's allocator rounds
  Lock lock(ledger);
  int64_t& used = live[device.index()];
  TORCH_CHECK_WITH(OutOfMemoryError, used + bytes <= capacity[device.index()], "CUDA out of memory. Tried to allocate ",
                   bytes, " bytes of ", capacity[device.index()], ", of which ", used, " are in use.");
  void* begin = aligned_alloc(512, bytes);
  memset(begin, 0x7f, bytes);  // a large number, so that nobody takes memory for zeros that was not written
  blocks[begin] = {bytes, device.index(), false};
  used += bytes;
  peak = std::max(peak, used);
  return {begin, begin, &release, device};
}

struct CardMemory : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { return allocate_on(card(-1), bytes); }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

static void unpin(void* begin) {
  Lock lock(ledger);
  pinned.erase(static_cast<char*>(begin));
  free(begin);
}

struct PinnedMemory : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* begin = aligned_alloc(512, (bytes + 512) / 512 * 512);
    Lock lock(ledger);
    pinned[static_cast<char*>(begin)] = bytes;
    return {begin, begin, &unpin, HOST};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

static bool is_pinned(const void* data) {
  Lock lock(ledger);
  auto place = static_cast<const char*>(data);
  auto after = pinned.upper_bound(place);
  if (after == pinned.begin()) return false;
  auto [begin, bytes] = *std::prev(after);
  return place <= begin + bytes;
}

static CardMemory card_memory;
static PinnedMemory pinned_memory;

static bool is_weight(const Tensor& tensor) {
  Lock lock(ledger);
  auto block = blocks.find(tensor.storage().data());
  return block != blocks.end() && block->second.is_weight;
}

static void mark_weight(const void* begin) {
  Lock lock(ledger);
  auto block = blocks.find(begin);
  if (block != blocks.end()) block->second.is_weight = true;
}

// --- Copies that the host does not wait for: until it waits for anything, what it copied to holds NaN. ---

static std::vector<std::pair<Tensor, Tensor>> pending;

static void finish_copies() {
  Lock lock(ledger);
  for (auto& [target, source] : pending) target.copy_(source);
  pending.clear();
}

static void wait(const std::string& what) {
  finish_copies();
  tell("wait: " + what);
}

// --- What torch asks a backend for. All streams are one. ---

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::kCUDA> {
  Device exchangeDevice(Device to) const override {
    Device before = card(-1);
    setDevice(to);
    return before;
  }
  Device getDevice() const override { return card(-1); }
  void setDevice(Device to) const override { current = card(to.index()).index(); }
  void uncheckedSetDevice(Device to) const noexcept override { current = card(to.index()).index(); }
  DeviceIndex deviceCount() const noexcept override { return CARDS; }
  c10::Stream getStream(Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, card(device.index()));
  }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream getNewStream(Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream to) const noexcept override { return getStream(to.device()); }
  void record(void**, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return CARDS; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  int getNumGPUs() const override { return CARDS; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return detail::getDefaultCPUGenerator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// --- A tensor of a card as the CPU's, and back. ---

static Tensor shaped(Storage storage, c10::DispatchKey key, const Tensor& like) {
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

static Tensor on_host(const Tensor& tensor) {  // in the same memory
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  Storage held = tensor.storage();
  Storage same(Storage::use_byte_size_t(), held.nbytes(), c10::DataPtr(held.mutable_data(), HOST),
               c10::GetAllocator(c10::kCPU), true);
  Tensor made = shaped(std::move(same), c10::DispatchKey::CPU, tensor);
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

static Storage new_storage(Device device, size_t bytes) {
  return Storage(Storage::use_byte_size_t(), bytes, allocate_on(device, bytes), &card_memory, true);
}

static Storage storage_like(Device device, const Tensor& host) {  // a copy of what the CPU made
  size_t bytes = host.storage().nbytes();
  Storage made = new_storage(device, bytes);
  if (bytes) memcpy(made.mutable_data(), host.storage().data(), bytes);
  return made;
}

// --- The fallback. ---

using Names = std::unordered_set<std::string>;
static const Names READ_BY_HOST{  // their results, or how large these are
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::equal", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave"};
static const Names INDEXING{  // take indices from the machine's memory
    "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};
static const Names TAKE_NUMBERS{  // tensors of one value that lie in the machine's memory; as those that are pointwise
    "aten::masked_fill_", "aten::masked_fill", "aten::fill_", "aten::where", "aten::floor_divide", "aten::remainder"};
static const Names FLOAT_ONLY{  // on a card
    "aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv", "aten::dot"};

class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack)
      : op_(op), name_(op.schema().name()), is_pointwise_(op.hasTag(at::Tag::pointwise)), stack_(stack) {}

  void run() {
    const auto& arguments = op_.schema().arguments();
    size_t first = stack_->size() - arguments.size();
    for (size_t n = 0; n < arguments.size(); n++) {
      const auto* alias = arguments[n].alias_info();
      take((*stack_)[first + n], alias && alias->isWrite());
    }
    if (READ_BY_HOST.count(name_)) wait(name_.substr(6));
    {
      at::AutoDispatchBelowADInplaceOrView below;
      c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      op_.callBoxed(stack_);
    }
    for (auto& [tensor, host] : written_) take_over(tensor, host);
    for (size_t n = stack_->size() - op_.schema().returns().size(); n < stack_->size(); n++) give((*stack_)[n]);
  }

 private:
  void take(IValue& value, bool is_written) {
    if (value.isTensor()) {
      value = host_of(value.toTensor(), is_written);
    } else if (value.isTensorList()) {
      std::vector<Tensor> hosts;
      for (const Tensor& tensor : value.toTensorVector()) hosts.push_back(host_of(tensor, is_written));
      value = hosts;
    } else if (value.isList()) {  // of tensors that may be missing
      auto list = value.toList().copy();
      for (size_t n = 0; n < list.size(); n++) {
        IValue item = list.get(n);
        if (item.isTensor()) list.set(n, host_of(item.toTensor(), is_written));
      }
      value = list;
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      if (given_.empty()) device_ = card(value.toDevice().index());
      value = HOST;
    }
  }

  Tensor host_of(const Tensor& tensor, bool is_written) {
    if (!tensor.defined() || tensor.is_meta()) return tensor;
    bool is_indexing = INDEXING.count(name_);
    if (!tensor.is_cuda()) {
      bool is_number = tensor.dim() == 0 && (is_pointwise_ || TAKE_NUMBERS.count(name_));
      bool is_index = is_indexing && !given_.empty();
      is_number = tensor.unsafeGetTensorImpl()->is_wrapped_number() || is_number || is_index;
      check_same_device(is_number && !is_written, tensor);
      if (is_index && tensor.dim()) wait("copy of an index to the card");
      return tensor;
    }
    if (given_.empty()) device_ = tensor.device();
    check_same_device(tensor.device() == device_, tensor);
    bool is_integer = c10::isIntegralType(tensor.scalar_type(), true);
    TORCH_CHECK_NOT_IMPLEMENTED(!is_integer || !FLOAT_ONLY.count(name_), "\"", name_, "_cuda\" not implemented for '",
                                tensor.scalar_type(), "'");
    if (is_indexing && !given_.empty() && tensor.scalar_type() == at::kBool && !is_written) wait("nonzero of a mask");
    Tensor host = on_host(tensor);
    given_.emplace_back(tensor, host);
    if (is_written) written_.emplace_back(tensor, host);
    return host;
  }

  void check_same_device(bool is_same, const Tensor& tensor) const {
    TORCH_CHECK(is_same, "Expected all tensors to be on the same device, but found at least two devices, ", device_,
                " and ", tensor.device(), "! (in ", name_, ")");
  }

  void take_over(const Tensor& tensor, const Tensor& host) const {  // what may have got another size
    if (host.storage().data() != tensor.storage().data())
      tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(storage_like(tensor.device(), host));
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }

  void give(IValue& value) const {
    if (value.isTensor()) {
      value = card_of(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> cards;
      for (const Tensor& host : value.toTensorVector()) cards.push_back(card_of(host));
      value = cards;
    }
  }

  Tensor card_of(const Tensor& made) const {
    if (!made.defined()) return made;
    for (auto& [tensor, host] : written_)
      if (made.is_same(host)) return tensor;
    for (auto& [tensor, host] : given_)  // a view
      if (made.storage().data() == tensor.storage().data() && tensor.storage().nbytes())
        return shaped(tensor.storage(), c10::DispatchKey::CUDA, made);
    Tensor result = shaped(storage_like(device_, made), c10::DispatchKey::CUDA, made);
    for (auto& [tensor, host] : given_)
      if (is_pointwise_ && tensor.numel() == made.numel() && is_weight(tensor)) mark_weight(result.storage().data());
    return result;
  }

  const c10::OperatorHandle& op_;
  const std::string& name_;
  bool is_pointwise_;
  Stack* stack_;
  Device device_ = card(-1);
  std::vector<std::pair<Tensor, Tensor>> given_, written_;  // on a card, and the same on the host
};

static void run(const c10::OperatorHandle& op, Stack* stack) { Call(op, stack).run(); }

// --- Kernels of their own: of memory alone. ---

static Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                            std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  auto type = c10::scalarTypeToTypeMeta(dtype.value_or(at::kFloat));
  size_t bytes = at::detail::computeStorageNbytes(size, stride, type.itemsize());
  Storage storage = new_storage(card(device ? device->index() : -1), bytes);
  auto keys = c10::DispatchKeySet(c10::DispatchKey::CUDA);
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, type);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return made;
}

static Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
                    std::optional<Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  auto options = at::TensorOptions().device(at::kMeta).memory_format(format.value_or(at::MemoryFormat::Contiguous));
  return empty_strided(size, at::empty(size, options).strides(), dtype, layout, device, pin);
}

static Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  bool is_to_card = self.is_cuda() && !source.is_cuda(), is_to_host = !self.is_cuda() && source.is_cuda();
  bool is_whole_weight = source.is_cuda() && self.numel() == source.numel() && is_weight(source);
  if (is_to_host && is_whole_weight) tell("weights read");
  if (is_to_host && non_blocking && self.numel() && is_pinned(self.storage().data())) {
    Lock lock(ledger);
    pending.emplace_back(self, on_host(source).clone());
    memset(self.storage().mutable_data(), 0xff, self.storage().nbytes());
    return self;
  }
  if (is_to_host) wait("copy to the host");
  if (is_to_card && !non_blocking) wait("copy to the card");
  if (is_to_card) finish_copies();  // in the order of the stream
  on_host(self).copy_(on_host(source));
  if (self.is_cuda() && is_whole_weight) mark_weight(self.storage().data());
  return self;
}

static Tensor& set_part(Tensor& self, Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  auto* held = self.unsafeGetTensorImpl();
  held->set_storage_keep_dtype(std::move(source));
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (stride.empty() && !size.empty()) {
    held->set_storage_offset(offset.expect_int());
    held->set_sizes_contiguous(sizes);
  } else {
    held->set_sizes_and_strides(sizes, C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  }
  return self;
}

static Tensor& set_whole(Tensor& self, Storage source) {
  c10::SymInt size = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_part(self, std::move(source), 0, {size}, {});
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy_);
  library.impl("set_.source_Storage", set_whole);
  library.impl("set_.source_Storage_storage_offset", set_part);
  for (auto name : {"convolution", "convolution_backward", "repeat_interleave.Tensor"})  // which else ask for a device
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
}
static const bool is_registered = (c10::SetAllocator(c10::kCUDA, &card_memory), true);

extern "C" {
void card_listen(void (*event)(const char*)) { happened = event; }
void card_wait() { wait("synchronize"); }
int card_current() { return current; }
void card_use(int number) { current = card(number).index(); }
int64_t card_live(int number) { return live[card(number).index()]; }
int64_t card_capacity(int number) { return capacity[card(number).index()]; }
void card_set_capacity(int64_t bytes) { std::fill_n(capacity, CARDS, bytes); }
void card_mark_weight(const void* begin) { mark_weight(begin); }
int64_t card_peak() { return peak; }
void card_reset_peak() { peak = 0; }
}
