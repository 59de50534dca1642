// Messages and failures of the plugins. TensorRT calls them through noexcept methods, so a failure inside becomes one
// log line and the method's own error value; `guarded` does that for every method. Lines go to the logger of the
// engine that called, which TensorRT makes known through a logger finder, or to stderr where there is none.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <sstream>
#include <stdexcept>

namespace fly {

using Severity = nvinfer1::ILogger::Severity;

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

// One line, "[fly] where: message", cut at 1024 bytes. Allocates nothing, so it can report a failed allocation.
void log(Severity severity, char const* where, char const* message) noexcept;

// Throws an error whose message is the parts written one after the other.
template <typename... TParts>
[[noreturn]] void fail(TParts const&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

// The result of body(), or onFailure after a log line when it throws.
template <typename TResult, typename TBody>
TResult guarded(char const* where, TResult onFailure, TBody&& body) noexcept {
    try {
        return body();
    } catch (std::exception const& error) {
        log(Severity::kERROR, where, error.what());
    } catch (...) {
        log(Severity::kERROR, where, "failed with an exception of an unknown type");
    }
    return onFailure;
}

}  // namespace fly
