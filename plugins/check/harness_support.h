// What the harness needs in TensorRT's place: a logger that remembers, an expression builder, the plugin library
// opened as the plugin registry opens it, device memory, and the counting of checks.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fly::check {

// Counts checks and prints the failed ones; the exit status of the harness is its verdict.
class Report {
public:
    void expect(bool holds, std::string const& what) {
        ++mNumChecks;
        if (!holds) {
            ++mNumFailed;
            std::printf("FAILED  %s\n", what.c_str());
        }
    }
    int32_t numChecks() const {
        return mNumChecks;
    }
    int32_t numFailed() const {
        return mNumFailed;
    }

private:
    int32_t mNumChecks{0};
    int32_t mNumFailed{0};
};

class RememberingLogger final : public nvinfer1::ILogger {
public:
    void log(Severity severity, char const* message) noexcept override {
        if (severity <= Severity::kERROR) {
            mErrors.emplace_back(message);
        }
    }
    // True when an error that contains `text` was logged since the last call.
    bool tookError(std::string const& text) {
        bool found = false;
        for (std::string const& error : mErrors) {
            found = found || error.find(text) != std::string::npos;
        }
        mErrors.clear();
        return found;
    }

private:
    std::vector<std::string> mErrors;
};

class LoggerFinder final : public nvinfer1::ILoggerFinder {
public:
    explicit LoggerFinder(nvinfer1::ILogger& logger) : mLogger(logger) {}
    nvinfer1::ILogger* findLogger() override {
        return &mLogger;
    }

private:
    nvinfer1::ILogger& mLogger;
};

// A size that is known, or one that is only a name: such expressions are told apart by their addresses.
class Expression final : public nvinfer1::IDimensionExpr {
public:
    static constexpr int64_t kUnknown = std::numeric_limits<int64_t>::min();

    explicit Expression(int64_t value) : mState(value) {
        mImpl = &mState;
    }

private:
    struct State final : nvinfer1::apiv::VDimensionExpr {
        explicit State(int64_t initial) : value(initial) {}
        bool isConstant() const override {
            return value != kUnknown;
        }
        int64_t getConstantValue() const override {
            return value;
        }
        bool isSizeTensor() const override {
            return false;
        }
        int64_t value;
    };
    State mState;
};

// Makes constants only: the plugins take their output sizes from their inputs and fields as they are. What it makes
// lives as long as it does.
class ExpressionBuilder final : public nvinfer1::IExprBuilder {
public:
    ExpressionBuilder() {
        mImpl = &mState;
    }

private:
    struct State final : nvinfer1::apiv::VExprBuilder {
        nvinfer1::IDimensionExpr const* constant(int64_t value) override {
            made.push_back(std::make_unique<Expression>(value));
            return made.back().get();
        }
        nvinfer1::IDimensionExpr const* operation(nvinfer1::DimensionOperation, nvinfer1::IDimensionExpr const&,
            nvinfer1::IDimensionExpr const&) override {
            return nullptr;
        }
        nvinfer1::IDimensionExpr const* declareSizeTensor(
            int32_t, nvinfer1::IDimensionExpr const&, nvinfer1::IDimensionExpr const&) override {
            return nullptr;
        }
        std::vector<std::unique_ptr<Expression>> made;
    };
    State mState;
};

class Library {
public:
    Library(char const* path, nvinfer1::ILoggerFinder& finder) : mHandle(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
        if (mHandle == nullptr) {
            throw std::runtime_error(dlerror());
        }
        symbol<void (*)(nvinfer1::ILoggerFinder*)>("setLoggerFinder")(&finder);
        int32_t count = 0;
        auto const creators
            = symbol<nvinfer1::IPluginCreatorInterface* const* (*) (int32_t&)>("getCreators")(count);
        mCreators.assign(creators, creators + count);
    }
    Library(Library const&) = delete;
    Library& operator=(Library const&) = delete;

    int32_t numCreators() const {
        return static_cast<int32_t>(mCreators.size());
    }
    // The creator of this name, or null.
    nvinfer1::IPluginCreatorV3One* creator(std::string const& name) const {
        for (nvinfer1::IPluginCreatorInterface* const candidate : mCreators) {
            if (std::strcmp(candidate->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0) {
                auto* const creator = static_cast<nvinfer1::IPluginCreatorV3One*>(candidate);
                if (creator->getPluginName() == name) {
                    return creator;
                }
            }
        }
        return nullptr;
    }

private:
    template <typename TFunction>
    TFunction symbol(char const* name) const {
        void* const address = dlsym(mHandle, name);
        if (address == nullptr) {
            throw std::runtime_error(std::string("the library does not export ") + name);
        }
        return reinterpret_cast<TFunction>(address);
    }

    void* mHandle;  // never closed: creators live as long as the process
    std::vector<nvinfer1::IPluginCreatorInterface*> mCreators;
};

inline void checkCuda(cudaError_t status, char const* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
    }
}

// Device memory filled with 0xff, so that what a kernel leaves unwritten is seen. The filling and an upload may still
// be under way when their calls return: a launch on a non-blocking stream needs a cudaDeviceSynchronize() before it.
class DeviceBuffer {
public:
    explicit DeviceBuffer(size_t numBytes) : mNumBytes(numBytes) {
        checkCuda(cudaMalloc(&mData, numBytes == 0 ? 1 : numBytes), "cudaMalloc");
        poison();
    }
    DeviceBuffer(DeviceBuffer&& other) noexcept
        : mData(std::exchange(other.mData, nullptr)), mNumBytes(other.mNumBytes) {}
    DeviceBuffer& operator=(DeviceBuffer&&) = delete;
    ~DeviceBuffer() {
        cudaFree(mData);
    }
    void poison() {
        checkCuda(cudaMemset(mData, 0xff, mNumBytes), "cudaMemset");
    }
    void upload(std::vector<char> const& bytes) {
        checkCuda(cudaMemcpy(mData, bytes.data(), bytes.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    std::vector<char> download() const {
        std::vector<char> bytes(mNumBytes);
        checkCuda(cudaMemcpy(bytes.data(), mData, mNumBytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
        return bytes;
    }
    void* data() const {
        return mData;
    }

private:
    void* mData{nullptr};
    size_t mNumBytes;
};

}  // namespace fly::check
