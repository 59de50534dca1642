// See harness_cases.h. Logits are multiples of 1/4, which float16 and bfloat16 hold exactly, so that one reference
// serves all three types and equal maxima occur.
#include "check/harness_cases.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <numeric>
#include <random>
#include <utility>

namespace fly::check {
namespace {

using nvinfer1::DataType;

template <typename T>
std::vector<char> bytesOf(std::vector<T> const& values) {
    std::vector<char> bytes(values.size() * sizeof(T));
    if (!values.empty()) {
        std::memcpy(bytes.data(), values.data(), bytes.size());
    }
    return bytes;
}

std::vector<char> encodeLogits(std::vector<float> const& logits, DataType type) {
    if (type == DataType::kHALF) {
        std::vector<__half> halves;
        std::transform(
            logits.begin(), logits.end(), std::back_inserter(halves), [](float x) { return __float2half(x); });
        return bytesOf(halves);
    }
    if (type == DataType::kBF16) {
        std::vector<__nv_bfloat16> halves;
        std::transform(
            logits.begin(), logits.end(), std::back_inserter(halves), [](float x) { return __float2bfloat16(x); });
        return bytesOf(halves);
    }
    return bytesOf(logits);
}

// Logits first in the list of types, the other two behind it.
std::vector<DataType> logitsTypes(DataType first) {
    std::vector<DataType> types{first};
    for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        if (type != first) {
            types.push_back(type);
        }
    }
    return types;
}

Case entropyGateCase(DataType type, int32_t const& topK, int64_t vocabSize, uint32_t seed = 0) {
    int64_t const batchSize = 2;
    int64_t const numTokens = 3;
    int64_t const numRows = batchSize * numTokens;
    std::mt19937 random(static_cast<uint32_t>(vocabSize + topK) + seed);
    std::vector<float> logits(static_cast<size_t>(numRows * vocabSize));
    for (float& logit : logits) {
        logit = (static_cast<float>(random() % 65) - 32.0F) / 4.0F;
    }
    std::vector<int64_t> nextTokens, argmax;
    std::vector<int64_t> topIds;
    std::vector<float> entropy, entropyTopk, argmaxLogprob, tokenLogprob, topLogprobs;
    for (int64_t row = 0; row < numRows; ++row) {
        float const* const begin = logits.data() + row * vocabSize;
        float const* const end = begin + vocabSize;
        nextTokens.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(vocabSize)));
        auto const best = std::max_element(begin, end);
        double sum = 0;
        std::for_each(begin, end, [&](float x) { sum += std::exp(static_cast<double>(x) - *best); });
        double const logSum = *best + std::log(sum);
        auto const term = [logSum](double total, double x) { return total - std::exp(x - logSum) * (x - logSum); };
        std::vector<int64_t> ranked(static_cast<size_t>(vocabSize));
        std::iota(ranked.begin(), ranked.end(), 0);
        std::stable_sort(ranked.begin(), ranked.end(), [=](int64_t a, int64_t b) { return begin[a] > begin[b]; });
        double full = 0;
        double top = 0;
        for (int64_t i = 0; i < vocabSize; ++i) {
            int64_t const token = ranked[static_cast<size_t>(i)];
            full = term(full, begin[token]);
            if (i < topK) {
                top = full;
                topIds.push_back(token);
                topLogprobs.push_back(static_cast<float>(begin[token] - logSum));
            }
        }
        argmax.push_back(best - begin);
        entropy.push_back(static_cast<float>(full));
        entropyTopk.push_back(static_cast<float>(top));
        argmaxLogprob.push_back(static_cast<float>(*best - logSum));
        tokenLogprob.push_back(static_cast<float>(begin[nextTokens.back()] - logSum));
    }
    std::vector<int64_t> const perToken{batchSize, numTokens};
    std::vector<int64_t> const perRank{batchSize, numTokens, topK};
    Case result{"EntropyGate", "type code " + std::to_string(static_cast<int32_t>(type)) + ", top_k "
            + std::to_string(topK) + ", vocabulary " + std::to_string(vocabSize),
        {{"top_k", &topK, nvinfer1::PluginFieldType::kINT32, 1}}, {}, {}, 2e-5};
    result.inputs = {
        {"logits", "BTV", {batchSize, numTokens, vocabSize}, logitsTypes(type), encodeLogits(logits, type)},
        {"next_tokens", "BT", perToken, {DataType::kINT64}, bytesOf(nextTokens)},
    };
    result.outputs = {
        {"argmax", "BT", perToken, {DataType::kINT64}, bytesOf(argmax)},
        {"entropy", "BT", perToken, {DataType::kFLOAT}, bytesOf(entropy)},
        {"entropy_topk", "BT", perToken, {DataType::kFLOAT}, bytesOf(entropyTopk)},
        {"argmax_logprob", "BT", perToken, {DataType::kFLOAT}, bytesOf(argmaxLogprob)},
        {"token_logprob", "BT", perToken, {DataType::kFLOAT}, bytesOf(tokenLogprob)},
        {"top_ids", "BTK", perRank, {DataType::kINT64}, bytesOf(topIds)},
        {"top_logprobs", "BTK", perRank, {DataType::kFLOAT}, bytesOf(topLogprobs)},
    };
    return result;
}

constexpr int32_t kTopKs[]{3, 1, 8};  // not local: plugin fields point at them

// The sum over the `count` largest probabilities of a row of logits, nats.
double entropyOf(float const* begin, float const* end, int64_t count) {
    double const best = *std::max_element(begin, end);
    std::vector<double> logits(begin, end);
    std::sort(logits.rbegin(), logits.rend());
    double sum = 0;
    std::for_each(logits.begin(), logits.end(), [&](double x) { sum += std::exp(x - best); });
    double const logSum = best + std::log(sum);
    return std::accumulate(logits.begin(), logits.begin() + count, 0.0,
        [logSum](double total, double x) { return total - std::exp(x - logSum) * (x - logSum); });
}

struct Row {
    std::vector<int64_t> nextTokens, argmax;
    std::vector<float> gate;
    int64_t numContext, numDraft;
    float threshold;
    int64_t window, lookahead;
};

// How many drafts stand: the first that neither matches nor is loosened ends them.
int64_t countAccepted(Row const& row, std::vector<int64_t> const& stopTokens) {
    auto const isStop = [&](int64_t token) {
        return std::find(stopTokens.begin(), stopTokens.end(), token) != stopTokens.end();
    };
    auto const matches = [&](int64_t draft) {
        size_t const position = static_cast<size_t>(row.numContext - 1 + draft);
        return row.nextTokens[position] == row.argmax[position];
    };
    for (int64_t draft = 0; draft < row.numDraft; ++draft) {
        size_t const position = static_cast<size_t>(row.numContext - 1 + draft);
        bool loosened = row.gate[position] >= row.threshold && !isStop(row.nextTokens[position])
            && !isStop(row.argmax[position]) && draft + std::max(row.window, row.lookahead) < row.numDraft;
        for (int64_t ahead = 1; loosened && ahead <= row.lookahead; ++ahead) {
            loosened = matches(draft + ahead);
        }
        if (!matches(draft) && !loosened) {
            return draft;
        }
    }
    return row.numDraft;
}

Case looseWindowAcceptCase(std::vector<int64_t> const& stopTokens) {
    int64_t const batchSize = 64;
    int64_t const numTokens = 17;
    std::mt19937 random(7);
    auto const draw = [&random](uint32_t size) { return static_cast<int64_t>(random() % size); };
    std::vector<int64_t> nextTokens, argmax, numContext, numDraft, window, lookahead, numAccepted, nextToken;
    std::vector<float> entropy, entropyTopk, threshold;
    std::vector<int32_t> useFullEntropy;
    for (int64_t b = 0; b < batchSize; ++b) {
        Row row{};
        useFullEntropy.push_back(static_cast<int32_t>(b % 2));
        for (int64_t t = 0; t < numTokens; ++t) {
            row.argmax.push_back(draw(20));
            row.nextTokens.push_back(draw(5) == 0 ? draw(20) : row.argmax.back());
            entropy.push_back(static_cast<float>(draw(8)) / 8.0F);
            entropyTopk.push_back(static_cast<float>(draw(8)) / 8.0F);
            row.gate.push_back(b % 2 == 1 ? entropy.back() : entropyTopk.back());
        }
        row.numContext = 1 + draw(3);
        row.numDraft = b % 8 == 0 ? draw(3) : numTokens - row.numContext;  // also rows with padding and without drafts
        row.threshold = b % 16 == 3 ? std::numeric_limits<float>::infinity() : 0.25F;
        row.window = draw(7);
        row.lookahead = draw(4);
        numAccepted.push_back(countAccepted(row, stopTokens));
        nextToken.push_back(row.argmax[static_cast<size_t>(row.numContext - 1 + numAccepted.back())]);
        nextTokens.insert(nextTokens.end(), row.nextTokens.begin(), row.nextTokens.end());
        argmax.insert(argmax.end(), row.argmax.begin(), row.argmax.end());
        numContext.push_back(row.numContext);
        numDraft.push_back(row.numDraft);
        threshold.push_back(row.threshold);
        window.push_back(row.window);
        lookahead.push_back(row.lookahead);
    }
    std::vector<int64_t> const perToken{batchSize, numTokens};
    std::vector<int64_t> const perRow{batchSize};
    int64_t const numStopTokens = static_cast<int64_t>(stopTokens.size());
    Case result{"LooseWindowAccept", std::to_string(numStopTokens) + " stop tokens", {}, {}, {}, 0};
    result.inputs = {
        {"next_tokens", "BT", perToken, {DataType::kINT64}, bytesOf(nextTokens)},
        {"argmax", "BT", perToken, {DataType::kINT64}, bytesOf(argmax)},
        {"entropy", "BT", perToken, {DataType::kFLOAT}, bytesOf(entropy)},
        {"entropy_topk", "BT", perToken, {DataType::kFLOAT}, bytesOf(entropyTopk)},
        {"num_context", "B", perRow, {DataType::kINT64}, bytesOf(numContext)},
        {"num_draft", "B", perRow, {DataType::kINT64}, bytesOf(numDraft)},
        {"entropy_threshold", "B", perRow, {DataType::kFLOAT}, bytesOf(threshold)},
        {"use_full_entropy", "B", perRow, {DataType::kINT32}, bytesOf(useFullEntropy)},
        {"window", "B", perRow, {DataType::kINT64}, bytesOf(window)},
        {"lookahead", "B", perRow, {DataType::kINT64}, bytesOf(lookahead)},
        {"stop_token_ids", "N", {numStopTokens}, {DataType::kINT64}, bytesOf(stopTokens)},
    };
    result.outputs = {
        {"num_accepted", "B", perRow, {DataType::kINT64}, bytesOf(numAccepted)},
        {"next_token", "B", perRow, {DataType::kINT64}, bytesOf(nextToken)},
    };
    return result;
}

// Not local: plugin fields point at them.
constexpr float kThreshold = 0.3F;
constexpr int32_t kWindow = 2;
constexpr int32_t kLookahead = 1;
constexpr int32_t kVocabSize = 61;
constexpr int32_t kStopTokens[]{5, 9};

// Three context requests, one of them without drafts, and two generation requests, of one token each.
Case packedLooseAcceptCase(DataType type, uint32_t seed = 0) {
    using nvinfer1::PluginFieldType;
    struct Request {
        int32_t chunk, numDrafts, contextLength;
    };
    Request const requests[]{{2, 20, 22}, {1, 0, 1}, {1, 40, 41}, {1, 0, 17}, {1, 0, 300}};
    int64_t const rowSize = kVocabSize + 3;
    std::vector<int64_t> const stopTokens(std::begin(kStopTokens), std::end(kStopTokens));
    std::mt19937 random(11 + seed);
    std::vector<float> logits;
    std::vector<std::pair<size_t, float>> raised;  // places in the logits, and what stands there then
    std::vector<int32_t> lastTokenIds, inputIds, contextLengths;
    for (Request const& request : requests) {
        size_t const firstPlace = logits.size();
        Row row{{}, {}, {}, 1, request.numDrafts, kThreshold, kWindow, kLookahead};
        inputIds.insert(inputIds.end(), static_cast<size_t>(request.chunk), 1);
        for (int32_t i = 0; i <= request.numDrafts; ++i) {
            for (int64_t token = 0; token < rowSize; ++token) {
                logits.push_back(token < kVocabSize ? (static_cast<float>(random() % 65) - 32.0F) / 4.0F : 100.0F);
            }
            float const* const begin = &logits[logits.size() - static_cast<size_t>(rowSize)];
            float const* const end = begin + kVocabSize;
            row.argmax.push_back(std::max_element(begin, end) - begin);
            row.gate.push_back(static_cast<float>(entropyOf(begin, end, kTopKs[0])));
            row.nextTokens.push_back(random() % 5 == 0 ? static_cast<int64_t>(random() % kVocabSize) : row.argmax.back());
            lastTokenIds.push_back(static_cast<int32_t>(inputIds.size()));
            if (i < request.numDrafts) {
                inputIds.push_back(static_cast<int32_t>(row.nextTokens.back()));
            }
        }
        for (int64_t i = 0; i < countAccepted(row, stopTokens); ++i) {
            size_t const at = static_cast<size_t>(i);
            if (row.nextTokens[at] != row.argmax[at]) {
                size_t const place = firstPlace + at * static_cast<size_t>(rowSize);
                float const best = logits[place + static_cast<size_t>(row.argmax[at])];
                raised.emplace_back(place + static_cast<size_t>(row.nextTokens[at]), best + 1.0F);
            }
        }
        contextLengths.push_back(request.contextLength);
    }
    std::vector<float> rewritten = logits;
    for (auto const& [place, logit] : raised) {
        rewritten[place] = logit;
    }
    int64_t const numRows = static_cast<int64_t>(lastTokenIds.size());
    Case result{"PackedLooseAccept", "type code " + std::to_string(static_cast<int32_t>(type)),
        {{"entropy_threshold", &kThreshold, PluginFieldType::kFLOAT32, 1},
            {"window", &kWindow, PluginFieldType::kINT32, 1}, {"lookahead", &kLookahead, PluginFieldType::kINT32, 1},
            {"vocab_size", &kVocabSize, PluginFieldType::kINT32, 1},
            {"stop_token_ids", kStopTokens, PluginFieldType::kINT32, 2}},
        {}, {}, 0};
    result.inputs = {
        {"logits", "RV", {numRows, rowSize}, logitsTypes(type), encodeLogits(logits, type)},
        {"last_token_ids", "R", {numRows}, {DataType::kINT32}, bytesOf(lastTokenIds)},
        {"input_ids", "T", {static_cast<int64_t>(inputIds.size())}, {DataType::kINT32}, bytesOf(inputIds)},
        {"context_lengths", "S", {static_cast<int64_t>(contextLengths.size())}, {DataType::kINT32},
            bytesOf(contextLengths)},
    };
    result.outputs = {{"rewritten", "RV", {numRows, rowSize}, {type}, encodeLogits(rewritten, type)}};
    return result;
}

}  // namespace

std::vector<Case> allCases() {
    std::vector<Case> cases;
    for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        cases.push_back(entropyGateCase(type, kTopKs[0], 5003));
    }
    cases.push_back(entropyGateCase(DataType::kFLOAT, kTopKs[1], 128256));
    cases.push_back(entropyGateCase(DataType::kBF16, kTopKs[2], 896));
    cases.push_back(looseWindowAcceptCase({-1}));
    cases.push_back(looseWindowAcceptCase({2, 5, 11}));
    for (DataType const type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        cases.push_back(packedLooseAcceptCase(type));
    }
    return cases;
}

std::vector<CasePair> pairsForOneWorkspace() {
    std::vector<CasePair> pairs;
    auto const add = [&pairs](DataType type, int32_t const& topK) {
        pairs.push_back({entropyGateCase(type, topK, 128256), entropyGateCase(type, topK, 128256, 1)});
    };
    add(DataType::kFLOAT, kTopKs[0]);
    add(DataType::kBF16, kTopKs[2]);
    pairs.push_back({packedLooseAcceptCase(DataType::kFLOAT), packedLooseAcceptCase(DataType::kFLOAT, 1)});
    return pairs;
}

}  // namespace fly::check
