// cortex.neuron.kernels._info: what the extension beside it was built with. Needs no torch, so
// that the daemon can report it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

namespace {

std::vector<std::string> words_of(const std::string& text) {
    std::istringstream stream(text);
    std::vector<std::string> words;
    for (std::string word; stream >> word;) words.push_back(word);
    return words;
}

pybind11::dict describe() {
    pybind11::dict build;
    build["cuda_archs"] = words_of(CORTEX_BUILD_ARCHS);
    build["cuda_version"] = CORTEX_BUILD_CUDA;
    build["torch_version"] = CORTEX_BUILD_TORCH;
    build["compiler"] = "C++ " __VERSION__;
    build["flags"] = words_of(CORTEX_BUILD_FLAGS);
    return build;
}

}  // namespace

PYBIND11_MODULE(_info, m) {
    m.doc() = "What the native operators were built with.";
    m.def("describe", &describe,
          "Return cuda_archs (empty: CPU only), cuda_version, torch_version, compiler and flags.");
}
