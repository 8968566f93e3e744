/* Puts a hospital's disk under a process: each fsync, fdatasync, msync and syncfs takes SLOW_SYNC_MS milliseconds longer.
 *
 *     gcc -shared -fPIC -O2 -o slow_sync.so slow_sync.c -ldl
 *     SLOW_SYNC_MS=5 LD_PRELOAD=./slow_sync.so PROGRAM
 *
 * With SLOW_SYNC_COUNT=FOLDER it counts them in FOLDER/<process ID>, 8 bytes, little endian, while the process runs.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static atomic_long here;
static atomic_long *count = &here;
static int milliseconds;

__attribute__((constructor)) static void begin(void)
{
    const char *given = getenv("SLOW_SYNC_MS"), *folder = getenv("SLOW_SYNC_COUNT");
    milliseconds = given ? atoi(given) : 5;
    if (!folder)
        return;
    char name[4096];
    snprintf(name, sizeof name, "%s/%d", folder, (int)getpid());
    int fd = open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0 || ftruncate(fd, sizeof(atomic_long)) != 0)
        return;
    void *shared = mmap(NULL, sizeof(atomic_long), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (shared != MAP_FAILED)
        count = shared;
    close(fd);
}

static void wait_longer(void)
{
    atomic_fetch_add(count, 1);
    if (milliseconds)
        usleep(milliseconds * 1000);
}

int fsync(int fd)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    wait_longer();
    return real(fd);
}

int fdatasync(int fd)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    wait_longer();
    return real(fd);
}

int syncfs(int fd)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "syncfs");
    wait_longer();
    return real(fd);
}

int msync(void *start, size_t length, int flags)
{
    int (*real)(void *, size_t, int) = (int (*)(void *, size_t, int))dlsym(RTLD_NEXT, "msync");
    wait_longer();
    return real(start, length, flags);
}
