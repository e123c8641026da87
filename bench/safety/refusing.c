/* A file system that is small, or refuses calls, below one folder: preloaded into a process, which sets it by these functions.

   cmt_root(path)        where it is; anywhere else nothing changes
   cmt_quota(bytes)      what regular files there may hold in all, -1 for no limit; a write that passes it is cut short, then ENOSPC
   cmt_honest(yes)       whether statvfs tells of the quota, or nothing at all, as some network file systems do
   cmt_refuse(call, n)   "flock", "sync" (fsync of a folder), "over" (rename over a file), "folder" (rename of a folder), "link":
                         it fails with errno n; 0 puts it right again
   cmt_refused(call)     how often it did; cmt_most() the most bytes that were ever held, since cmt_root() */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static size_t root_length;
static long quota = -1, most, sum;
static int honest = 1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *const calls[] = {"flock", "sync", "over", "folder", "link"};
enum { FLOCK, SYNC, OVER, FOLDER, LINK, CALLS };
static int refuses[CALLS], refused[CALLS];

static int call_of(const char *name) {
    for (int i = 0; i < CALLS; i++)
        if (!strcmp(name, calls[i])) return i;
    abort();
}

void cmt_root(const char *path) {
    if (!realpath(path, root)) abort();
    root_length = strlen(root);
    most = 0;
}
void cmt_quota(long bytes) { quota = bytes; }
void cmt_honest(int yes) { honest = yes; }
void cmt_refuse(const char *name, int number) { refuses[call_of(name)] = number; }
int cmt_refused(const char *name) { return refused[call_of(name)]; }
long cmt_most(void) { return most; }

#define REAL(type, name, ...)                                  \
    static type (*real)(__VA_ARGS__);                          \
    if (!real) *(void **)(&real) = dlsym(RTLD_NEXT, name)

static int below(const char *path) {
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int below_relative(const char *path) { /* of a path that may not be there yet */
    char whole[2 * PATH_MAX];
    if (!root_length) return 0;
    if (path[0] == '/') return below(path);
    if (!getcwd(whole, PATH_MAX)) return 0;
    strcat(whole, "/");
    strncat(whole, path, PATH_MAX - 1);
    return below(whole);
}

static int fd_below(int fd) {
    char name[64], path[PATH_MAX];
    if (!root_length) return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(name, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return below(path);
}

static int add(const char *path, const struct stat *about, int kind, struct FTW *place) {
    (void)path, (void)place;
    if (kind == FTW_F && S_ISREG(about->st_mode)) sum += about->st_size;
    return 0;
}

static long used(void) {
    sum = 0;
    nftw(root, add, 16, FTW_PHYS);
    return sum;
}

static int refuse(int call) {
    if (!refuses[call]) return 0;
    refused[call]++;
    errno = refuses[call];
    return 1;
}

/* Bytes of n that may be written at `at` (-1: at the file's own place), -1 with errno for none; the lock is held. */
static ssize_t room(int fd, size_t n, off_t at) {
    struct stat about;
    if (fstat(fd, &about) || !S_ISREG(about.st_mode)) return n;
    if (at < 0) at = fcntl(fd, F_GETFL) & O_APPEND ? about.st_size : lseek(fd, 0, SEEK_CUR);
    long grows = at + (long)n - about.st_size, holds = used();
    if (grows < 0) grows = 0;
    if (quota >= 0 && grows && holds + grows > quota) {
        long fits = (long)n - (holds + grows - quota);
        if (fits <= 0) {
            errno = ENOSPC;
            return -1;
        }
        grows -= (long)n - fits, n = fits;
    }
    if (holds + grows > most) most = holds + grows;
    return n;
}

#define LIMITED(type, fd, n, at, plain, short)                 \
    if (!fd_below(fd)) return plain;                           \
    pthread_mutex_lock(&lock);                                 \
    ssize_t fits = room(fd, n, at), out = -1;                  \
    if (fits >= 0) out = short;                                \
    pthread_mutex_unlock(&lock);                               \
    return out

ssize_t write(int fd, const void *data, size_t n) {
    REAL(ssize_t, "write", int, const void *, size_t);
    LIMITED(ssize_t, fd, n, -1, real(fd, data, n), real(fd, data, fits));
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    LIMITED(ssize_t, fd, n, at, real(fd, data, n, at), real(fd, data, fits, at));
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return pwrite64(fd, data, n, at); }
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (!fd_below(fd)) return real(fd, parts, count);
    ssize_t total = 0;
    for (int i = 0; i < count; i++) {
        ssize_t n = write(fd, parts[i].iov_base, parts[i].iov_len);
        if (n < 0) return total ? total : -1;
        total += n;
        if ((size_t)n < parts[i].iov_len) break;
    }
    return total;
}
static int grown(int fd, off64_t size) {
    struct stat about;
    if (!fd_below(fd) || fstat(fd, &about) || size <= about.st_size) return 0;
    pthread_mutex_lock(&lock);
    int full = quota >= 0 && used() + size - about.st_size > quota;
    pthread_mutex_unlock(&lock);
    if (full) errno = ENOSPC;
    return full;
}
int ftruncate64(int fd, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    return grown(fd, size) ? -1 : real(fd, size);
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }
int posix_fallocate64(int fd, off64_t at, off64_t n) {
    REAL(int, "posix_fallocate64", int, off64_t, off64_t);
    return grown(fd, at + n) ? ENOSPC : real(fd, at, n);
}
int posix_fallocate(int fd, off_t at, off_t n) { return posix_fallocate64(fd, at, n); }
/* so that nobody goes round the quota by the kernel's copies: callers then write */
ssize_t copy_file_range(int a, off64_t *at, int b, off64_t *to, size_t n, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    if (!fd_below(b)) return real(a, at, b, to, n, flags);
    errno = EXDEV;
    return -1;
}

int statvfs64(const char *path, struct statvfs64 *out) {
    REAL(int, "statvfs64", const char *, struct statvfs64 *);
    int result = real(path, out);
    if (!result && quota >= 0 && below_relative(path)) {
        pthread_mutex_lock(&lock);
        long left = quota - used();
        pthread_mutex_unlock(&lock);
        out->f_frsize = out->f_bsize = 1;
        out->f_blocks = honest ? quota + 1 : 0;
        out->f_bavail = out->f_bfree = honest && left > 0 ? left : 0;
    }
    return result;
}
int statvfs(const char *path, struct statvfs *out) { return statvfs64(path, (struct statvfs64 *)out); }

int flock(int fd, int how) {
    REAL(int, "flock", int, int);
    if (fd_below(fd) && refuse(FLOCK)) return -1;
    return real(fd, how);
}
int fsync(int fd) {
    REAL(int, "fsync", int);
    struct stat about;
    if (refuses[SYNC] && fd_below(fd) && !fstat(fd, &about) && S_ISDIR(about.st_mode) && refuse(SYNC)) return -1;
    return real(fd);
}
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    struct stat about;
    if (below_relative(to)) {
        if (!lstat(to, &about) && S_ISREG(about.st_mode) && refuse(OVER)) return -1;
        if (!lstat(from, &about) && S_ISDIR(about.st_mode) && refuse(FOLDER)) return -1;
    }
    return real(from, to);
}
int link(const char *from, const char *to) {
    REAL(int, "link", const char *, const char *);
    if (below_relative(to) && refuse(LINK)) return -1;
    return real(from, to);
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
    REAL(int, "linkat", int, const char *, int, const char *, int);
    if (below_relative(to) && refuse(LINK)) return -1;
    return real(a, from, b, to, flags);
}
