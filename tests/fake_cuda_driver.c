/* A libcuda of one device whose memory was allocated in no context, as that of memory pools is. */
#include <stdint.h>

int fake_num_retained, fake_num_wrong, fake_pointer_context;
static _Thread_local void *current;
static int context;

int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
  (void)pointer;
  if (attribute == 1) { /* the context */
    *(void **)data = fake_pointer_context ? &context : 0;
    return 0;
  }
  if (attribute != 9) return 1; /* the device's number */
  *(int *)data = 0;
  return 0;
}
int cuCtxSetCurrent(void *given) {
  current = given;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **given, int device) {
  if (device != 0) return 101;
  __atomic_add_fetch(&fake_num_retained, 1, __ATOMIC_SEQ_CST);
  *given = &context;
  return 0;
}
int cuDevicePrimaryCtxRelease_v2(int device) {
  if (device != 0) return 101;
  __atomic_sub_fetch(&fake_num_retained, 1, __ATOMIC_SEQ_CST);
  return 0;
}
/* For the fake cuFile: whether the calling thread may do anything. */
int fake_has_context(void) { return current == &context; }
