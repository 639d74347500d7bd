#include "memory/alias_capsule.h"

#include <memory>

#include "memory/dlpack.h"

namespace py = pybind11;

namespace dataeff {
namespace {

constexpr DLDataType kBytes = {kDlUInt, 8, 1};

struct Alias {
  DLManagedTensor managed{};
  int64_t nbytes = 0;
  int64_t stride = 1;
  PyObject* owner = nullptr;
};

void release(DLManagedTensor* managed) {
  auto* alias = static_cast<Alias*>(managed->manager_ctx);
  if (Py_IsInitialized()) {  // tensors may outlive the interpreter; then the owner is gone
    const PyGILState_STATE state = PyGILState_Ensure();
    Py_DECREF(alias->owner);
    PyGILState_Release(state);
  }
  delete alias;
}

void destroy_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // a tensor has taken it
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

}  // namespace

py::capsule alias_capsule(uintptr_t data, int64_t nbytes, int device_type, int device_id,
                          py::object owner) {
  auto alias = std::make_unique<Alias>();
  alias->nbytes = nbytes;
  alias->managed.dl_tensor = {reinterpret_cast<void*>(data),
                              {device_type, device_id},
                              1,
                              kBytes,
                              &alias->nbytes,
                              &alias->stride,
                              0};
  alias->managed.manager_ctx = alias.get();
  alias->managed.deleter = release;
  PyObject* capsule = PyCapsule_New(&alias->managed, "dltensor", destroy_capsule);
  if (!capsule) throw py::error_already_set();
  alias.release()->owner = owner.release().ptr();
  return py::reinterpret_steal<py::capsule>(capsule);
}

}  // namespace dataeff
