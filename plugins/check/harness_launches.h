// What needs a GPU: launches of the plugins, plain and in CUDA graphs.
#pragma once

#include "check/harness_plugin.h"
#include "check/harness_support.h"

namespace fly::check {

// The results of `plugin` are those of the case, and `attached` gives the same bits, also in a graph.
void checkLaunches(Case const& work, Plugin const& plugin, Plugin const& attached, Report& report);

// The results of launches that follow each other in a graph and share a workspace are those of lone launches.
void checkSharedWorkspace(CasePair const& pair, nvinfer1::IPluginCreatorV3One& creator, Report& report);

}  // namespace fly::check
