// See harness_launches.h.
#include "check/harness_launches.h"

#include <cmath>
#include <functional>

namespace fly::check {
namespace {

using Results = std::vector<std::vector<char>>;  // the bytes of each output

constexpr int32_t kSharedReplays = 1000;

class Stream {
public:
    Stream() {
        checkCuda(cudaStreamCreateWithFlags(&mStream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    }
    Stream(Stream const&) = delete;
    Stream& operator=(Stream const&) = delete;
    ~Stream() {
        cudaStreamDestroy(mStream);
    }
    operator cudaStream_t() const {
        return mStream;
    }
    void wait() const {
        checkCuda(cudaStreamSynchronize(mStream), "cudaStreamSynchronize");
    }

private:
    cudaStream_t mStream{};
};

// What `enqueue` puts on the stream, as a CUDA graph.
class Graph {
public:
    Graph(Stream const& stream, std::function<void()> const& enqueue) {
        checkCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
        enqueue();
        checkCuda(cudaStreamEndCapture(stream, &mGraph), "cudaStreamEndCapture");
        checkCuda(cudaGraphInstantiate(&mExecutable, mGraph, 0), "cudaGraphInstantiate");
    }
    Graph(Graph const&) = delete;
    Graph& operator=(Graph const&) = delete;
    ~Graph() {
        cudaGraphExecDestroy(mExecutable);
        cudaGraphDestroy(mGraph);
    }
    void replay(Stream const& stream) const {
        checkCuda(cudaGraphLaunch(mExecutable, stream), "cudaGraphLaunch");
    }

private:
    cudaGraph_t mGraph{};
    cudaGraphExec_t mExecutable{};
};

// A case's tensors on the device: the inputs with their values, the outputs poisoned.
class DeviceCase {
public:
    explicit DeviceCase(Case const& work)
        : mInputDescs(describe(work.inputs)), mOutputDescs(describe(work.outputs)),
          mDynamicInputs(describeDynamic(work.inputs)), mDynamicOutputs(describeDynamic(work.outputs)) {
        for (Tensor const& tensor : work.inputs) {
            mInputs.emplace_back(tensor.bytes.size()).upload(tensor.bytes);
            mInputPointers.push_back(mInputs.back().data());
        }
        for (Tensor const& tensor : work.outputs) {
            mOutputPointers.push_back(mOutputs.emplace_back(tensor.bytes.size()).data());
        }
    }
    size_t workspaceBytes(Plugin const& plugin) const {
        return plugin.build->getWorkspaceSize(mDynamicInputs.data(), static_cast<int32_t>(mDynamicInputs.size()),
            mDynamicOutputs.data(), static_cast<int32_t>(mDynamicOutputs.size()));
    }
    bool enqueue(Plugin const& plugin, DeviceBuffer const& workspace, Stream const& stream) const {
        return plugin.runtime->enqueue(mInputDescs.data(), mOutputDescs.data(), mInputPointers.data(),
                   mOutputPointers.data(), workspace.data(), stream)
            == 0;
    }
    Results results() const {
        Results bytes;
        for (DeviceBuffer const& output : mOutputs) {
            bytes.push_back(output.download());
        }
        return bytes;
    }

private:
    std::vector<nvinfer1::PluginTensorDesc> mInputDescs, mOutputDescs;
    std::vector<nvinfer1::DynamicPluginTensorDesc> mDynamicInputs, mDynamicOutputs;
    std::vector<DeviceBuffer> mInputs, mOutputs;
    std::vector<void const*> mInputPointers;
    std::vector<void*> mOutputPointers;
};

// Uploads and poison are on the legacy stream and may still be under way when their calls return; a non-blocking
// stream does not wait for them.
void waitForUploads() {
    checkCuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize after the uploads");
}

std::string nameOf(Case const& work) {
    return work.plugin + " (" + work.name + "): ";
}

// One launch on fresh memory, or two replays of its graph.
Results launch(Case const& work, Plugin const& plugin, bool inGraph, Report& report) {
    DeviceCase const tensors(work);
    DeviceBuffer const workspace(tensors.workspaceBytes(plugin));
    Stream const stream;
    auto const enqueue = [&] {
        std::string const what = inGraph ? "a launch under capture" : "a launch";
        report.expect(tensors.enqueue(plugin, workspace, stream), nameOf(work) + what);
    };
    waitForUploads();
    if (inGraph) {
        Graph const graph(stream, enqueue);
        graph.replay(stream);
        graph.replay(stream);
        stream.wait();
    } else {
        enqueue();
        stream.wait();
    }
    return tensors.results();
}

bool agree(std::vector<char> const& got, Tensor const& expected, double tolerance) {
    if (expected.types.front() != nvinfer1::DataType::kFLOAT) {
        return got == expected.bytes;
    }
    for (size_t at = 0; at < got.size(); at += sizeof(float)) {
        float a{};
        float b{};
        std::memcpy(&a, got.data() + at, sizeof(float));
        std::memcpy(&b, expected.bytes.data() + at, sizeof(float));
        if (!(std::abs(static_cast<double>(a) - b) <= tolerance)) {
            return false;
        }
    }
    return true;
}

// How many of the replays of a graph of both launches, `first` before `second`, differ from lone launches.
int32_t countDifferences(Case const& first, Case const& second, Plugin const& plugin, Results const& wantedFirst,
    Results const& wantedSecond, Report& report) {
    DeviceCase const firstTensors(first);
    DeviceCase const secondTensors(second);
    DeviceBuffer const workspace(std::max(firstTensors.workspaceBytes(plugin), secondTensors.workspaceBytes(plugin)));
    Stream const stream;
    waitForUploads();
    Graph const graph(stream, [&] {
        bool const enqueued = firstTensors.enqueue(plugin, workspace, stream)
            && secondTensors.enqueue(plugin, workspace, stream);
        report.expect(enqueued, nameOf(first) + "two launches under capture");
    });
    int32_t numDifferent = 0;
    for (int32_t i = 0; i < kSharedReplays; ++i) {
        graph.replay(stream);
        stream.wait();
        bool const same = firstTensors.results() == wantedFirst && secondTensors.results() == wantedSecond;
        numDifferent += same ? 0 : 1;
    }
    return numDifferent;
}

}  // namespace

void checkLaunches(Case const& work, Plugin const& plugin, Plugin const& attached, Report& report) {
    Results const results = launch(work, plugin, false, report);
    for (size_t i = 0; i < results.size(); ++i) {
        Tensor const& expected = work.outputs[i];
        report.expect(agree(results[i], expected, work.tolerance), nameOf(work) + "values of " + expected.name);
    }
    report.expect(launch(work, attached, false, report) == results,
        nameOf(work) + "the serialised, restored and attached plugin gives the same bits");
    report.expect(launch(work, attached, true, report) == results, nameOf(work) + "a CUDA graph gives the same bits");
}

// Replays of one launch cannot show that a kernel reads its workspace too early: what it finds there is of the replay
// before, and equal. Here it would be of the other launch. In the same way a launch that writes before the one in
// front of it has read would change that one's results; each takes both places.
void checkSharedWorkspace(CasePair const& pair, nvinfer1::IPluginCreatorV3One& creator, Report& report) {
    nvinfer1::PluginFieldCollection const fields{
        static_cast<int32_t>(pair.first.fields.size()), pair.first.fields.data()};
    Plugin const plugin(creator.createPlugin("layer", &fields, nvinfer1::TensorRTPhase::kBUILD));
    Results const first = launch(pair.first, plugin, false, report);
    Results const second = launch(pair.second, plugin, false, report);
    for (size_t i = 0; i < first.size(); ++i) {
        report.expect(first[i] != second[i], nameOf(pair.first) + "the pair differs in " + pair.first.outputs[i].name);
    }
    auto const expectNone = [&](int32_t numDifferent, char const* order) {
        report.expect(numDifferent == 0, nameOf(pair.first) + "of " + std::to_string(kSharedReplays)
                + " replays of two launches with one workspace, " + order + ", differ " + std::to_string(numDifferent));
    };
    expectNone(countDifferences(pair.first, pair.second, plugin, first, second, report), "in order");
    expectNone(countDifferences(pair.second, pair.first, plugin, second, first, report), "reversed");
}

}  // namespace fly::check
