// What an operator sees of ONNX Runtime: tensors, attributes, threads. An operator is a class with
//
//   static constexpr const char* name;
//   static constexpr Slot inputs[], outputs[];
//   explicit Operator(const Attributes&);
//   void compute(Context&) const;
//
// that `operator_of<Operator>()` turns into what ONNX Runtime registers. `compute` may run in several threads at once:
// what it needs besides its tensors comes from `Scratch`. Exceptions become errors of the step, with the operator's
// name.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <iterator>
#include <new>
#include <stdexcept>
#include <string>

#include "onnxruntime_abi.h"

namespace fly {

using abi::ElementType;
using abi::Presence;

struct Slot {
    ElementType type;  // kUndefined: any
    Presence presence = Presence::kRequired;
};

class Failure : public std::runtime_error {
   public:
    using std::runtime_error::runtime_error;
};

// Of what a graph gives an operator: nothing is read before its size is known to be right.
inline void require(bool is_right, const char* what) {
    if (!is_right) throw Failure(what);
}

// Pieces of at most `size`.
inline size_t parts(size_t count, size_t size) { return (count + size - 1) / size; }

constexpr size_t kMaxRank = 5;

struct Shape {
    int64_t sizes[kMaxRank] = {};
    size_t rank = 0;

    int64_t operator[](size_t axis) const { return sizes[axis]; }
    bool is(std::initializer_list<size_t> wanted) const {
        return rank == wanted.size() && std::equal(wanted.begin(), wanted.end(), sizes, [](size_t size, int64_t own) {
                   return static_cast<int64_t>(size) == own;
               });
    }
    bool operator==(const Shape& other) const {
        return rank == other.rank && std::equal(sizes, sizes + rank, other.sizes);
    }
    int64_t count(size_t first, size_t end) const {
        int64_t product = 1;
        for (size_t axis = first; axis < end; ++axis) product *= sizes[axis];
        return product;
    }
    int64_t count() const { return count(0, rank); }
    // All axes but the last: what operators on rows work on.
    int64_t rows() const { return count(0, last_axis()); }
    int64_t last() const { return sizes[last_axis()]; }
    Shape with_last(int64_t size) const {
        Shape shape = *this;
        shape.sizes[last_axis()] = size;
        return shape;
    }

   private:
    size_t last_axis() const {
        require(rank > 0, "rows of a tensor that has no axes");
        return rank - 1;
    }
};

struct Tensor {
    void* data = nullptr;  // may be null where there is nothing to read
    Shape shape;
    bool present = false;

    explicit operator bool() const { return present; }
    size_t count() const { return shape.count(); }
    template <typename T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

inline void check(const abi::Api* api, abi::Status* status) {
    if (status == nullptr) return;
    const Failure failure(api->get<const char*(const abi::Status*)>(abi::kGetErrorMessage)(status));
    api->get<void(abi::Status*)>(abi::kReleaseStatus)(status);
    throw failure;
}

inline abi::Status* failed(const abi::Api* api, const char* message) {
    return api->get<abi::Status*(abi::ErrorCode, const char*)>(abi::kCreateStatus)(abi::ErrorCode::kFail, message);
}

inline abi::Status* failed(const abi::Api* api, const char* where, const char* message) {
    char text[512];  // no memory may be what failed
    std::snprintf(text, sizeof(text), "%s: %s", where, message);
    return failed(api, text);
}

class Attributes {
   public:
    Attributes(const abi::Api* api, const abi::KernelInfo* info) : api_(api), info_(info) {}

    int64_t integer(const char* name, int64_t otherwise) const {
        return get(abi::kKernelInfoGetAttributeInt64, name, otherwise);
    }
    float number(const char* name, float otherwise) const {
        return get(abi::kKernelInfoGetAttributeFloat, name, otherwise);
    }

   private:
    template <typename T>
    T get(abi::Entry entry, const char* name, T otherwise) const {
        T value = otherwise;
        auto* status = api_->get<abi::Status*(const abi::KernelInfo*, const char*, T*)>(entry)(info_, name, &value);
        if (status == nullptr) return value;
        api_->get<void(abi::Status*)>(abi::kReleaseStatus)(status);
        return otherwise;
    }

    const abi::Api* api_;
    const abi::KernelInfo* info_;
};

class Context {
   public:
    Context(const abi::Api* api, abi::KernelContext* context) : api_(api), context_(context) {}

    // An optional input that the node does not have is not present.
    Tensor input(size_t index) const {
        const abi::Value* value = nullptr;
        check(
            api_,
            api_->get<abi::Status*(const abi::KernelContext*, size_t, const abi::Value**)>(abi::kKernelContextGetInput)(
                context_, index, &value));
        if (value == nullptr) return {};
        Tensor tensor;
        tensor.present = true;
        tensor.data = data(const_cast<abi::Value*>(value));
        abi::TensorShape* info = nullptr;
        check(
            api_,
            api_->get<abi::Status*(const abi::Value*, abi::TensorShape**)>(abi::kGetTensorTypeAndShape)(value, &info));
        api_->get<abi::Status*(const abi::TensorShape*, size_t*)>(abi::kGetDimensionsCount)(info, &tensor.shape.rank);
        const bool fits = tensor.shape.rank <= kMaxRank;
        if (fits)
            api_->get<abi::Status*(const abi::TensorShape*, int64_t*, size_t)>(abi::kGetDimensions)(
                info, tensor.shape.sizes, tensor.shape.rank);
        api_->get<void(abi::TensorShape*)>(abi::kReleaseTensorTypeAndShapeInfo)(info);
        require(fits, "a tensor of more than 5 axes");
        return tensor;
    }

    template <typename T>
    T* output(size_t index, const Shape& shape) const {
        abi::Value* value = nullptr;
        check(
            api_,
            api_->get<abi::Status*(abi::KernelContext*, size_t, const int64_t*, size_t, abi::Value**)>(
                abi::kKernelContextGetOutput)(context_, index, shape.sizes, shape.rank, &value));
        return value == nullptr ? nullptr : static_cast<T*>(data(value));
    }

    // Calls work(i) for each i below `count`, on the threads of the session, and waits for all of them. Which thread
    // has which i is not fixed. `work` must not throw.
    template <typename Work>
    void parallel(size_t count, const Work& work) const {
        if (count == 0) return;
        if (count == 1) return work(size_t{0});
        auto call = [](void* data, size_t index) { (*static_cast<const Work*>(data))(index); };
        void (*function)(void*, size_t) = call;
        check(
            api_,
            api_->get<abi::Status*(const abi::KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(
                abi::kKernelContextParallelFor)(context_, function, count, 0, const_cast<Work*>(&work)));
    }

   private:
    void* data(abi::Value* value) const {
        void* pointer = nullptr;
        check(api_, api_->get<abi::Status*(abi::Value*, void**)>(abi::kGetTensorMutableData)(value, &pointer));
        return pointer;
    }

    const abi::Api* api_;
    abi::KernelContext* context_;
};

// Memory of the calling thread, kept for the next call: a step allocates nothing. `reserve` forgets what was taken
// before.
class Scratch {
   public:
    static Scratch& of_thread() {
        thread_local Scratch scratch;
        return scratch;
    }
    // For work inside of Context::parallel, which the thread that has scratch of its own also does.
    static Scratch& of_task() {
        thread_local Scratch scratch;
        return scratch;
    }

    // Bytes behind each other, each part aligned to 64: sizes first, then parts in their order.
    void reserve(std::initializer_list<size_t> sizes) {
        size_t all = 0;
        for (const size_t size : sizes) all += aligned(size);
        if (all > capacity_) {
            std::free(bytes_);
            capacity_ = 0;
            bytes_ = static_cast<char*>(std::aligned_alloc(64, all));
            if (bytes_ == nullptr) throw std::bad_alloc();
            capacity_ = all;
        }
        next_ = bytes_;
    }
    template <typename T>
    T* take(size_t count) {
        T* part = reinterpret_cast<T*>(next_);
        next_ += aligned(count * sizeof(T));
        return part;
    }

    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(bytes_); }

   private:
    static size_t aligned(size_t size) { return (size + 63) / 64 * 64; }

    char* bytes_ = nullptr;
    char* next_ = nullptr;
    size_t capacity_ = 0;
};

// Calls work(i, scratch) for each i below `count`, with so many floats of scratch, in this thread alone where there is
// little to do. Throws std::bad_alloc at the end where a thread had no memory.
template <typename Work>
void share(const Context& context, size_t count, bool is_little, size_t scratch_size, const Work& work) {
    std::atomic<bool> has_memory = true;
    const auto one = [&](size_t index) {
        Scratch& scratch = Scratch::of_task();
        try {
            scratch.reserve({scratch_size * sizeof(float)});
        } catch (const std::bad_alloc&) {
            has_memory = false;
            return;
        }
        work(index, scratch.take<float>(scratch_size));
    };
    if (is_little)
        for (size_t index = 0; index < count; ++index) one(index);
    else
        context.parallel(count, one);
    if (!has_memory) throw std::bad_alloc();
}

template <typename Operator>
const abi::CustomOp* operator_of() {
    struct Kernel {
        const abi::Api* api;
        Operator op;
    };
    static const abi::CustomOp table = [] {
        abi::CustomOp op{};
        op.version = abi::API_VERSION;
        op.GetName = [](const abi::CustomOp*) { return Operator::name; };
        op.GetExecutionProviderType = [](const abi::CustomOp*) -> const char* { return nullptr; };
        op.GetInputType = [](const abi::CustomOp*, size_t i) { return Operator::inputs[i].type; };
        op.GetInputTypeCount = [](const abi::CustomOp*) { return std::size(Operator::inputs); };
        op.GetOutputType = [](const abi::CustomOp*, size_t i) { return Operator::outputs[i].type; };
        op.GetOutputTypeCount = [](const abi::CustomOp*) { return std::size(Operator::outputs); };
        op.GetInputCharacteristic = [](const abi::CustomOp*, size_t i) { return Operator::inputs[i].presence; };
        op.GetOutputCharacteristic = [](const abi::CustomOp*, size_t i) { return Operator::outputs[i].presence; };
        op.GetInputMemoryType = [](const abi::CustomOp*, size_t) { return abi::Memory::kDefault; };
        op.GetVariadicInputMinArity = [](const abi::CustomOp*) { return 0; };
        op.GetVariadicInputHomogeneity = [](const abi::CustomOp*) { return 0; };
        op.GetVariadicOutputMinArity = [](const abi::CustomOp*) { return 0; };
        op.GetVariadicOutputHomogeneity = [](const abi::CustomOp*) { return 0; };
        op.GetStartVersion = [](const abi::CustomOp*) { return 1; };
        op.GetEndVersion = [](const abi::CustomOp*) { return 1; };
        op.CreateKernelV2 = [](const abi::CustomOp*, const abi::Api* api, const abi::KernelInfo* info,
                               void** kernel) -> abi::Status* {
            try {
                *kernel = new Kernel{api, Operator(Attributes(api, info))};
                return nullptr;
            } catch (const std::exception& error) {
                return failed(api, Operator::name, error.what());
            }
        };
        op.KernelComputeV2 = [](void* kernel, abi::KernelContext* context) -> abi::Status* {
            auto* made = static_cast<Kernel*>(kernel);
            try {
                Context own(made->api, context);
                made->op.compute(own);
                return nullptr;
            } catch (const std::exception& error) {
                return failed(made->api, Operator::name, error.what());
            }
        };
        op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
        return op;
    }();
    return &table;
}

}  // namespace fly
