// See signature.h. Nothing here allocates unless it is about to throw, except readFields, because sizes are checked in
// every launch.
#include "common/signature.h"

#include "common/log.h"

#include <algorithm>
#include <cstring>

namespace fly {
namespace {

template <typename TItems, typename TWrite>
std::string join(TItems const& items, TWrite&& write) {
    std::ostringstream text;
    char const* separator = "";
    for (auto const& item : items) {
        text << separator;
        write(text, item);
        separator = ", ";
    }
    return text.str();
}

std::string shapeText(TensorSpec const& tensor) {
    return "[" + join(std::string(tensor.shape), [](std::ostream& text, char letter) { text << letter; }) + "]";
}

int32_t readInteger(IntegerField const& spec, nvinfer1::PluginField const& field) {
    using nvinfer1::PluginFieldType;
    if ((field.type != PluginFieldType::kINT32 && field.type != PluginFieldType::kINT64) || field.length != 1
        || field.data == nullptr) {
        fail("field ", spec.name, " has type code ", static_cast<int32_t>(field.type), " and ", field.length,
            " values, expected one INT32 or INT64: pass a single integer");
    }
    int64_t value{};
    if (field.type == PluginFieldType::kINT64) {
        std::memcpy(&value, field.data, sizeof(value));
    } else {
        int32_t narrow{};
        std::memcpy(&narrow, field.data, sizeof(narrow));
        value = narrow;
    }
    if (value < spec.minimum || value > spec.maximum) {
        fail("field ", spec.name, " is ", value, ", expected ", spec.minimum, " to ", spec.maximum,
            ": choose a value in that range");
    }
    return static_cast<int32_t>(value);
}

}  // namespace

void Sizes::add(TensorSpec const& tensor, nvinfer1::Dims const& dims) {
    checkRank(tensor, dims.nbDims);
    for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
        char const letter = tensor.shape[axis];
        size_t const at = index(letter);
        if (dims.d[axis] < 0) {
            fail(tensor.name, " ", shapeText(tensor), " has the unknown size ", dims.d[axis], " for ", letter,
                ": set every input shape before execution");
        }
        if (mFrom[at] == nullptr) {
            mFrom[at] = tensor.name;
            mSizes[at] = dims.d[axis];
        } else if (mSizes[at] != dims.d[axis]) {
            fail(tensor.name, " ", shapeText(tensor), " has ", letter, " = ", dims.d[axis], ", but ", mFrom[at],
                " has ", mSizes[at], ": give both the same size");
        }
    }
}

void Sizes::grow(TensorSpec const& tensor, nvinfer1::Dims const& dims) {
    checkRank(tensor, dims.nbDims);
    for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
        grow(tensor.shape[axis], dims.d[axis]);
    }
}

void Sizes::grow(char letter, int64_t size) {
    int64_t& largest = mSizes[index(letter)];
    largest = std::max(largest, size);
}

char const* nameOf(nvinfer1::DataType type) {
    using nvinfer1::DataType;
    switch (type) {
    case DataType::kFLOAT: return "float32";
    case DataType::kHALF: return "float16";
    case DataType::kBF16: return "bfloat16";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    case DataType::kBOOL: return "bool";
    default: return "a type the plugins never take";
    }
}

bool isOneOf(nvinfer1::DataType type, std::vector<nvinfer1::DataType> const& types) {
    return std::find(types.begin(), types.end(), type) != types.end();
}

void checkCount(std::vector<TensorSpec> const& tensors, int32_t count, char const* kind) {
    if (count != static_cast<int32_t>(tensors.size())) {
        fail("got ", count, " ", kind, ", expected ", tensors.size(), ": ",
            join(tensors, [](std::ostream& text, TensorSpec const& tensor) { text << tensor.name; }));
    }
}

void checkType(TensorSpec const& tensor, nvinfer1::DataType type) {
    if (!isOneOf(type, tensor.types)) {
        fail(tensor.name, " is ", nameOf(type), " (type code ", static_cast<int32_t>(type), "), expected ",
            join(tensor.types, [](std::ostream& text, nvinfer1::DataType allowed) { text << nameOf(allowed); }),
            ": cast it in the network");
    }
}

void checkRank(TensorSpec const& tensor, int32_t rank) {
    if (rank != static_cast<int32_t>(std::strlen(tensor.shape))) {
        fail(tensor.name, " has ", rank, " dimensions, expected ", shapeText(tensor));
    }
}

std::vector<int32_t> readFields(Signature const& signature, nvinfer1::PluginFieldCollection const* fields) {
    std::vector<int32_t> values;
    for (IntegerField const& spec : signature.fields) {
        values.push_back(spec.defaultValue);
    }
    int32_t const count = fields == nullptr ? 0 : fields->nbFields;
    for (int32_t i = 0; i < count; ++i) {
        nvinfer1::PluginField const& field = fields->fields[i];
        char const* const name = field.name == nullptr ? "" : field.name;
        auto const known = std::find_if(signature.fields.begin(), signature.fields.end(),
            [name](IntegerField const& spec) { return std::strcmp(spec.name, name) == 0; });
        if (known == signature.fields.end()) {
            std::string const names = join(
                signature.fields, [](std::ostream& text, IntegerField const& spec) { text << spec.name; });
            fail("unknown field '", name, "', expected ", names.empty() ? "no fields" : names, ": remove or rename it");
        }
        values[static_cast<size_t>(known - signature.fields.begin())] = readInteger(*known, field);
    }
    return values;
}

}  // namespace fly
