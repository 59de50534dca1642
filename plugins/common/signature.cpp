// See signature.h. Nothing here allocates unless it is about to throw, except readFields, because sizes are checked in
// every launch.
#include "common/signature.h"

#include "common/log.h"

#include <algorithm>
#include <cmath>
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

template <typename TFrom, typename TTo>
std::vector<TTo> copyOf(nvinfer1::PluginField const& field) {
    std::vector<TTo> values;
    for (int32_t i = 0; i < field.length; ++i) {
        TFrom value{};
        std::memcpy(&value, static_cast<char const*>(field.data) + static_cast<size_t>(i) * sizeof(TFrom), sizeof(TFrom));
        values.push_back(static_cast<TTo>(value));
    }
    return values;
}

// As an integer where it is one, so that large bounds are printed with all their digits.
std::string numberText(double number) {
    std::ostringstream text;
    if (std::abs(number) < 1e15 && number == std::floor(number)) {
        text << static_cast<int64_t>(number);
    } else {
        text << number;
    }
    return text.str();
}

// The field's values, which are of type `narrow` or `wide`.
template <typename TNarrow, typename TWide>
std::vector<TWide> readValues(Field const& spec, nvinfer1::PluginField const& field, nvinfer1::PluginFieldType narrow,
    nvinfer1::PluginFieldType wide, char const* expected, char const* fix) {
    bool const fits = (field.type == narrow || field.type == wide) && field.length >= 1
        && field.length <= spec.maxLength && field.data != nullptr;
    if (!fits) {
        std::string const several = spec.maxLength == 1 ? "one" : "1 to " + std::to_string(spec.maxLength);
        fail("field ", spec.name, " has type code ", static_cast<int32_t>(field.type), " and ", field.length,
            " values, expected ", several, " ", expected, ": pass ", fix);
    }
    std::vector<TWide> values = field.type == wide ? copyOf<TWide, TWide>(field) : copyOf<TNarrow, TWide>(field);
    for (TWide const value : values) {
        if (!(static_cast<double>(value) >= spec.minimum && static_cast<double>(value) <= spec.maximum)) {
            fail("field ", spec.name, " is ", value, ", expected ", numberText(spec.minimum), " to ",
                numberText(spec.maximum), ": choose a value in that range");
        }
    }
    return values;
}

FieldValue readField(Field const& spec, nvinfer1::PluginField const& field) {
    using nvinfer1::PluginFieldType;
    FieldValue read;
    if (spec.kind == FieldKind::kReal) {
        read.real = static_cast<float>(readValues<float, double>(
            spec, field, PluginFieldType::kFLOAT32, PluginFieldType::kFLOAT64, "FLOAT32 or FLOAT64", "a single number")
                .front());
        return read;
    }
    char const* const fix = spec.kind == FieldKind::kInteger ? "a single integer" : "integers";
    for (int64_t const value : readValues<int32_t, int64_t>(
             spec, field, PluginFieldType::kINT32, PluginFieldType::kINT64, "INT32 or INT64", fix)) {
        read.integers.push_back(static_cast<int32_t>(value));
    }
    return read;
}

FieldValue defaultOf(Field const& spec) {
    FieldValue value;
    if (spec.kind == FieldKind::kReal) {
        value.real = static_cast<float>(spec.defaultValue);
    } else {
        value.integers = {static_cast<int32_t>(spec.defaultValue)};
    }
    return value;
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

std::vector<FieldValue> readFields(Signature const& signature, nvinfer1::PluginFieldCollection const* fields) {
    std::vector<FieldValue> values;
    for (Field const& spec : signature.fields) {
        values.push_back(defaultOf(spec));
    }
    int32_t const count = fields == nullptr ? 0 : fields->nbFields;
    for (int32_t i = 0; i < count; ++i) {
        nvinfer1::PluginField const& field = fields->fields[i];
        char const* const name = field.name == nullptr ? "" : field.name;
        auto const known = std::find_if(signature.fields.begin(), signature.fields.end(),
            [name](Field const& spec) { return std::strcmp(spec.name, name) == 0; });
        if (known == signature.fields.end()) {
            std::string const names = join(
                signature.fields, [](std::ostream& text, Field const& spec) { text << spec.name; });
            fail("unknown field '", name, "', expected ", names.empty() ? "no fields" : names, ": remove or rename it");
        }
        values[static_cast<size_t>(known - signature.fields.begin())] = readField(*known, field);
    }
    return values;
}

}  // namespace fly
