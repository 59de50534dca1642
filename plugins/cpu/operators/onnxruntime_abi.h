// The part of ONNX Runtime's C interface that the operators use, so that building them needs no headers of it.
//
// The interface is one table of function pointers whose order never changes (onnxruntime_c_api.h: entries are added at
// the end alone). Here the table is an array, and `Entry` says where a function stands in it. Names and types are those
// of onnxruntime_c_api.h of version 1.28, whose API_VERSION is the oldest that fly-trt runs with.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fly::abi {

constexpr uint32_t API_VERSION = 28;
constexpr uint32_t FIRST_API_VERSION = 1;  // which every ONNX Runtime has

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorShape;  // OrtTensorTypeAndShapeInfo
struct ShapeInferContext;

enum class ErrorCode : int { kFail = 1 };
enum class ElementType : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt64 = 7, kBool = 9, kFloat16 = 10 };
enum class Presence : int { kRequired = 0, kOptional = 1 };
enum class Memory : int { kDefault = 0 };

enum Entry : size_t {
    kCreateStatus = 0,
    kGetErrorMessage = 2,
    kCreateCustomOpDomain = 26,
    kCustomOpDomainAdd = 27,
    kAddCustomOpDomain = 28,
    kGetTensorMutableData = 51,
    kGetDimensionsCount = 61,
    kGetDimensions = 62,
    kGetTensorTypeAndShape = 65,
    kKernelInfoGetAttributeFloat = 85,
    kKernelInfoGetAttributeInt64 = 86,
    kKernelContextGetInput = 90,
    kKernelContextGetOutput = 91,
    kReleaseStatus = 93,
    kReleaseTensorTypeAndShapeInfo = 99,
    kReleaseCustomOpDomain = 101,
    kKernelContextParallelFor = 274,
};

struct Api {
    void* entries[kKernelContextParallelFor + 1];

    template <typename Function>
    Function* get(Entry entry) const {
        return reinterpret_cast<Function*>(entries[entry]);
    }
};

struct ApiBase {
    const Api* (*GetApi)(uint32_t version);
    const char* (*GetVersionString)();
};

// OrtCustomOp as far as version 28 has it.
struct CustomOp {
    uint32_t version;
    void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
    const char* (*GetName)(const CustomOp*);
    const char* (*GetExecutionProviderType)(const CustomOp*);
    ElementType (*GetInputType)(const CustomOp*, size_t);
    size_t (*GetInputTypeCount)(const CustomOp*);
    ElementType (*GetOutputType)(const CustomOp*, size_t);
    size_t (*GetOutputTypeCount)(const CustomOp*);
    void (*KernelCompute)(void*, KernelContext*);
    void (*KernelDestroy)(void*);
    Presence (*GetInputCharacteristic)(const CustomOp*, size_t);
    Presence (*GetOutputCharacteristic)(const CustomOp*, size_t);
    Memory (*GetInputMemoryType)(const CustomOp*, size_t);
    int (*GetVariadicInputMinArity)(const CustomOp*);
    int (*GetVariadicInputHomogeneity)(const CustomOp*);
    int (*GetVariadicOutputMinArity)(const CustomOp*);
    int (*GetVariadicOutputHomogeneity)(const CustomOp*);
    Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);
    Status* (*KernelComputeV2)(void*, KernelContext*);
    Status* (*InferOutputShapeFn)(const CustomOp*, ShapeInferContext*);
    int (*GetStartVersion)(const CustomOp*);
    int (*GetEndVersion)(const CustomOp*);
    size_t (*GetMayInplace)(int**, int**);
    void (*ReleaseMayInplace)(int*, int*);
    size_t (*GetAliasMap)(int**, int**);
    void (*ReleaseAliasMap)(int*, int*);
};

}  // namespace fly::abi
