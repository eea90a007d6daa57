// The Python module resnet_fused._C. Importing it is what loads the library; ops are not called through it.
#include <Python.h>

#include "cpu/large_buffers.h"
#include "kernels.h"

static PyObject* built_with_cuda(PyObject*, PyObject*) {
#ifdef USE_CUDA
  Py_RETURN_TRUE;
#else
  Py_RETURN_FALSE;
#endif
}

static PyObject* release_buffers(PyObject*, PyObject*) {
  return PyLong_FromLongLong(resnet_fused::cpu::release_large_buffers());
}

static PyObject* use_buffers(PyObject*, PyObject* enabled) {
  const int is_true = PyObject_IsTrue(enabled);
  if (is_true < 0) return nullptr;
  return PyBool_FromLong(resnet_fused::cpu::use_large_buffers(is_true));
}

static PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(resnet_fused::cpu::cpu_isa()); }

static PyMethodDef methods[] = {
    {"built_with_cuda", built_with_cuda, METH_NOARGS, "Whether the CUDA kernels were compiled in."},
    {"release_buffers", release_buffers, METH_NOARGS, "Unmaps idle buffers; returns their bytes."},
    {"use_buffers", use_buffers, METH_O, "Switches buffers on or off; returns whether they were on."},
    {"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set of the CPU convolutions."},
    {nullptr, nullptr, 0, nullptr}};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
