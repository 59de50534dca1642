// One case through one plugin, by every method that TensorRT calls: types, formats, shapes, configuration, cloning,
// serialisation and, with a GPU, launches whose results are compared with the case's.
#pragma once

#include "check/harness_cases.h"
#include "check/harness_support.h"

namespace fly::check {

void drive(Case const& work, nvinfer1::IPluginCreatorV3One& creator, RememberingLogger& logger, Report& report,
    bool withGpu);

}  // namespace fly::check
