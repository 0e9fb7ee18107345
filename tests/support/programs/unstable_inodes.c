/* A file gets another inode number each time its status is read. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/stat.h>

static unsigned long number = 1000;

#define UNSTABLE(name, parameters, ...) \
    int name parameters { \
        int (*real) parameters = dlsym(RTLD_NEXT, #name); \
        int result = real(__VA_ARGS__); \
        found->st_ino = number++; \
        return result; \
    }
#define ALL(stat, fstat, fstatat) \
    UNSTABLE(stat, (const char *path, struct stat *found), path, found) \
    UNSTABLE(fstat, (int fd, struct stat *found), fd, found) \
    UNSTABLE(fstatat, (int fd, const char *path, struct stat *found, int flags), \
             fd, path, found, flags)
ALL(stat, fstat, fstatat)
ALL(stat64, fstat64, fstatat64)
