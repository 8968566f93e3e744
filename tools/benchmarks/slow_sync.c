/* Puts a hospital's disk under a process: each fsync, fdatasync and msync takes SLOW_SYNC_MS milliseconds longer.
 *
 *     gcc -shared -fPIC -O2 -o slow_sync.so slow_sync.c -ldl
 *     SLOW_SYNC_MS=5 LD_PRELOAD=./slow_sync.so PROGRAM
 *
 * With SLOW_SYNC_COUNT=FILE it writes how many there were to that file when the process ends.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static atomic_long count;

static void wait_longer(void)
{
    static int milliseconds = -1;
    if (milliseconds < 0) {
        const char *given = getenv("SLOW_SYNC_MS");
        milliseconds = given ? atoi(given) : 5;
    }
    atomic_fetch_add(&count, 1);
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

int msync(void *start, size_t length, int flags)
{
    int (*real)(void *, size_t, int) = (int (*)(void *, size_t, int))dlsym(RTLD_NEXT, "msync");
    wait_longer();
    return real(start, length, flags);
}

__attribute__((destructor)) static void tell(void)
{
    const char *name = getenv("SLOW_SYNC_COUNT");
    FILE *file = name ? fopen(name, "w") : NULL;
    if (file) {
        fprintf(file, "%ld\n", atomic_load(&count));
        fclose(file);
    }
}
