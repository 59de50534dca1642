// See log.h. The finder is the only state: TensorRT owns it and sets it once, when it loads the library.
#include "common/log.h"

#include <atomic>
#include <cstdio>

namespace fly {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> loggerFinder{nullptr};

nvinfer1::ILogger* findLogger() noexcept {
    nvinfer1::ILoggerFinder* const finder = loggerFinder.load();
    try {
        return finder == nullptr ? nullptr : finder->findLogger();
    } catch (...) {
        return nullptr;
    }
}

}  // namespace

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
    loggerFinder.store(finder);
}

void log(Severity severity, char const* where, char const* message) noexcept {
    char line[1024];
    std::snprintf(line, sizeof(line), "[fly] %s: %s", where, message);
    if (nvinfer1::ILogger* const logger = findLogger()) {
        logger->log(severity, line);
    } else {
        std::fprintf(stderr, "%s\n", line);
    }
}

}  // namespace fly
