// The calls that the harness makes: for each plugin its inputs with values, the types it must take and give, and the
// outputs that a plain loop on the host computes for them.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace fly::check {

struct Tensor {
    std::string name;
    std::string shape;  // a letter per dimension; the same letter means the same size
    std::vector<int64_t> sizes;
    std::vector<nvinfer1::DataType> types;  // all that the plugin must take here; the first is that of the values
    std::vector<char> bytes;
};

struct Case {
    std::string plugin;
    std::string name;
    std::vector<nvinfer1::PluginField> fields;
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;  // with the expected values
    double tolerance;            // of float outputs, absolute; integers must be equal
};

// EntropyGate for each type of logits and several values of top_k, LooseWindowAccept with and without stop tokens,
// PackedLooseAccept for each type of logits.
std::vector<Case> allCases();

struct CasePair {
    Case first;
    Case second;  // with other values in the same shapes
};

// Of EntropyGate and PackedLooseAccept, which have a workspace.
std::vector<CasePair> pairsForOneWorkspace();

}  // namespace fly::check
