// Preloaded: stands between a program and the calls that change files, and strikes at one of them.
//
// It does nothing until `attack_arm` is called. Then the Nth call on a regular file or folder is struck:
//   KILL  the process is killed before the call,
//   TEAR  half of what would be written is written, then the process is killed,
//   FULL  this and all later calls that need room fail with ENOSPC, after half of the first was written,
//   LOCK  this and all later calls fail with EROFS.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { KILL, TEAR, FULL, LOCK };
enum { PASSES = -1 };

static long left = PASSES, seen = 0;
static int how = KILL;

void attack_arm(long calls, int mode) { left = calls, how = mode, seen = 0; }
long attack_seen(void) { return seen; }

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

// Counts a call, and returns whether it is to fail; `needs_room` says whether a full disk is in its way.
static int strikes(int needs_room) {
  ++seen;
  if (left == PASSES || --left > 0) return 0;
  left = 0;
  if (how == KILL || how == TEAR) raise(SIGKILL);
  if (how == FULL && !needs_room) return 0;
  errno = how == FULL ? ENOSPC : EROFS;
  return 1;
}

static int is_file(int fd) {
  struct stat found;
  return fstat(fd, &found) == 0 && (S_ISREG(found.st_mode) || S_ISDIR(found.st_mode));
}

ssize_t write(int fd, const void* data, size_t size) {
  if (!is_file(fd)) return NEXT(write)(fd, data, size);
  const int is_first = left == 1;
  if (is_first && size > 1 && (how == TEAR || how == FULL)) {
    const ssize_t written = NEXT(write)(fd, data, size / 2);
    if (how == FULL) {  // what is left fails
      left = 0, ++seen;
      return written;
    }
  }
  return strikes(1) ? -1 : NEXT(write)(fd, data, size);
}

static int changes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC)); }

#define OPENS(name, parameters, arguments)                              \
  int name parameters {                                                 \
    mode_t mode = 0;                                                    \
    va_list rest;                                                       \
    va_start(rest, flags);                                              \
    if (flags & (O_CREAT | O_TMPFILE)) mode = va_arg(rest, mode_t);     \
    va_end(rest);                                                       \
    if (changes(flags) && strikes((flags & O_CREAT) != 0)) return -1;   \
    return NEXT(name) arguments;                                        \
  }
OPENS(open, (const char* path, int flags, ...), (path, flags, mode))
OPENS(open64, (const char* path, int flags, ...), (path, flags, mode))
OPENS(openat, (int folder, const char* path, int flags, ...), (folder, path, flags, mode))
OPENS(openat64, (int folder, const char* path, int flags, ...), (folder, path, flags, mode))

#define CALLS(name, needs_room, parameters, arguments) \
  int name parameters { return strikes(needs_room) ? -1 : NEXT(name) arguments; }
CALLS(fsync, 1, (int fd), (fd))
CALLS(fdatasync, 1, (int fd), (fd))
CALLS(ftruncate, 0, (int fd, off_t size), (fd, size))
CALLS(ftruncate64, 0, (int fd, off64_t size), (fd, size))
CALLS(rename, 0, (const char* old, const char* new), (old, new))
CALLS(renameat, 0, (int from, const char* old, int to, const char* new), (from, old, to, new))
CALLS(unlink, 0, (const char* path), (path))
CALLS(unlinkat, 0, (int folder, const char* path, int flags), (folder, path, flags))
CALLS(rmdir, 0, (const char* path), (path))
CALLS(mkdir, 1, (const char* path, mode_t mode), (path, mode))
