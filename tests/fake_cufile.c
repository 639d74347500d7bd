/* A libcufile of system calls, with switches for what can be wrong with the real one. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

typedef struct { int error, cuda_error; } Status;
typedef struct { int type; union { int fd; void *handle; }; const void *operations; } Descriptor;

int fake_nvfs_major = 2, fake_open_error, fake_register_error, fake_result, fake_errno, fake_corrupt;
int fake_most; /* bytes that a call moves at most, unless 0 */
int fake_num_open, fake_num_registered, fake_num_reads, fake_num_writes;

Status cuFileDriverOpen(void) {
  if (!fake_open_error) __atomic_add_fetch(&fake_num_open, 1, __ATOMIC_SEQ_CST);
  return (Status){fake_open_error, 0};
}
Status cuFileDriverClose(void) {
  __atomic_sub_fetch(&fake_num_open, 1, __ATOMIC_SEQ_CST);
  return (Status){0, 0};
}
Status cuFileDriverGetProperties(void *properties) {
  *(unsigned *)properties = fake_nvfs_major;
  return (Status){0, 0};
}
Status cuFileHandleRegister(void **handle, Descriptor *descriptor) {
  if (fake_register_error || descriptor->type != 1) return (Status){fake_register_error + 1, 0};
  *handle = malloc(sizeof(int));
  *(int *)*handle = descriptor->fd;
  __atomic_add_fetch(&fake_num_registered, 1, __ATOMIC_SEQ_CST);
  return (Status){0, 0};
}
void cuFileHandleDeregister(void *handle) {
  free(handle);
  __atomic_sub_fetch(&fake_num_registered, 1, __ATOMIC_SEQ_CST);
}
/* Of `fake_cuda_driver.c`, where that is loaded. */
extern int fake_has_context(void) __attribute__((weak));
static int no_context(void) { return fake_has_context && !fake_has_context(); }

/* O_DIRECT wants aligned memory, and cuFile takes any: through a buffer, then. */
static ssize_t bounced(int fd, char *data, size_t size, off_t at, int writes) {
  void *buffer;
  if (fake_most && size > (size_t)fake_most) size = fake_most;
  if (posix_memalign(&buffer, 4096, size)) return -1;
  if (writes) memcpy(buffer, data, size);
  ssize_t moved = writes ? pwrite(fd, buffer, size, at) : pread(fd, buffer, size, at);
  if (!writes && moved > 0) memcpy(data, buffer, moved);
  free(buffer);
  return moved;
}
ssize_t cuFileRead(void *handle, void *base, size_t size, off_t at, off_t shift) {
  __atomic_add_fetch(&fake_num_reads, 1, __ATOMIC_SEQ_CST);
  if (no_context()) return -5011; /* no CUDA context */
  if (fake_result) return errno = fake_errno, fake_result;
  ssize_t got = bounced(*(int *)handle, (char *)base + shift, size, at, 0);
  if (fake_corrupt && got > 0) *((char *)base + shift) ^= 1;
  return got;
}
ssize_t cuFileWrite(void *handle, const void *base, size_t size, off_t at, off_t shift) {
  __atomic_add_fetch(&fake_num_writes, 1, __ATOMIC_SEQ_CST);
  if (no_context()) return -5011;
  if (fake_result) return errno = fake_errno, fake_result;
  return bounced(*(int *)handle, (char *)base + shift, size, at, 1);
}
