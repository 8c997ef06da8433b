// kdmos._C: importing it registers the ops; build_info() says how they were built.
#include <Python.h>

#include <string>

#ifndef KDMOS_BUILD
#define KDMOS_BUILD ""
#endif

namespace {

std::string instructions() {
#if defined(__AVX512BF16__)
  return "AVX-512 with bf16";
#elif defined(__AVX512F__)
  return "AVX-512";
#elif defined(__AVX2__) && defined(__FMA__)
  return "AVX2 with FMA";
#elif defined(__ARM_NEON)
  return "NEON";
#else
  return "baseline";
#endif
}

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s}", "compiler", __VERSION__, "instructions", instructions().c_str(), "arch",
                       KDMOS_BUILD);
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "Compiler, instruction set and architecture flag of the CPU ops."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Native CPU ops of kdmos.", -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
