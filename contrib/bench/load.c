// load: the benchmark's clients, on loopback. They compare every byte that a server sends (see `replay`).
//
//   load make    -f FILE -b BYTES               write BYTES of the pattern that the other commands expect to FILE
//   load replay  -p PORT -f FILE -c CLIENTS     each client reads the file from byte 0 to its end, twice: first it
//                compares the bytes; the second time is measured, and only counts them. Copying and comparing is as
//                slow as sending, so in the second run the kernel discards the bytes
//   load follow  -p PORT -f FILE -c CLIENTS -n RECORDS -r RATE -l LENGTH [-k PID] [-R REPLAYERS]
//                each client catches up; then RATE records a second are appended, and each client must receive each
//                -k: kill the process PID just before the first record. -R: meanwhile, REPLAYERS more clients read
//                the file from byte 0 again and again
//   load connect -p PORT -f FILE -c CLIENTS     connect, send the header and read the file: one client after the
//                other, then all at once
//
//   -t THREADS   the number of threads that share the clients (1)
//   -B SENDERS   for replay and follow: instead of a server, threads of this program do nothing but send. This
//                measures the limit of what can be measured
//
// All commands but `make` print {"ready": ...}, wait for a line on standard input, print {"result": ...}, and wait for
// the end of standard input. In between, the caller can examine the server. On a wrong, missing or surplus byte they
// print {"error": ...} and exit with status 1.
//
// The byte at an offset depends only on the offset. So a lost, repeated or misplaced byte is detected, no client needs
// the file to compare with, and the size of the file does not matter.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    PERIOD = 1048583,     // period of the pattern in bytes: a prime, so that no chunk or page has this length
    BUFFER = 256 << 10,   // bytes read at a time: they fit the second-level cache, so comparing them is cheap
    CHUNK = 1 << 20,      // bytes discarded, or sent to one of several clients, at a time
    UNSENT = 128 << 10,   // with -B: bytes queued in a socket; more of them cause cache misses
    EVENTS = 256,         // events returned by one epoll_wait(2)
    WINDOW = 1024,        // clients that wait for their first byte: more would exceed the server's backlog
    PER_ADDRESS = 10000,  // clients from one loopback address, which has some 28,000 ports
    PATIENCE = 20,        // seconds without a byte after which missing bytes count as lost
    LIFETIME = 600,       // seconds after which this program ends in any case
};

static struct {
    const char *file;
    uint64_t bytes;
    double rate;
    int port, clients, records, length, replayers, threads, senders;
    pid_t victim;
} option = {.rate = 100, .clients = 1, .length = 128, .threads = 1};

struct client {
    int fd;
    uint64_t offset;
};

struct reader {  // a thread and its share of the clients
    pthread_t thread;
    struct client *clients;
    int first, count, epoll;
    uint64_t deliveries, *latencies;  // one for each record and client
    uint64_t *slowest;                // for each record: the latency of the last client
    uint64_t finished;                // when the last byte was received
};

static unsigned char pattern[2 * PERIOD];
static int file;
static uint64_t base;                  // bytes in the file at the start
static _Atomic uint64_t written;       // bytes that may be in the file now
static _Atomic uint64_t *appended_at;  // for each record: the time just before write(2)
static _Atomic uint64_t replayed;      // bytes
static _Atomic bool replaying;
static pthread_barrier_t gate;  // the readers, and the main thread

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static double cpu_seconds(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...) {
    flockfile(stdout);  // never unlocked, so that only the first failure is printed
    va_list arguments;
    va_start(arguments, format);
    printf("{\"error\": \"");
    vprintf(format, arguments);
    printf("\"}\n");
    fflush(stdout);
    _exit(1);
}

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    putchar('\n');
    fflush(stdout);
    va_end(arguments);
}

// Returns the result of a system call. Ends the program if it is an error.
static int must(int result, const char *call) {
    if (result < 0) fail("%s: %s", call, strerror(errno));
    return result;
}

static void *must_have(void *memory) {
    if (!memory) fail("out of memory");
    return memory;
}

static void make_pattern(void) {
    uint64_t state = 20260101, word = 0;
    for (int i = 0; i < PERIOD; i++) {
        if (i % 8 == 0) {  // splitmix64
            word = state += 0x9e3779b97f4a7c15;
            word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9;
            word = (word ^ word >> 27) * 0x94d049bb133111eb;
            word ^= word >> 31;
        }
        pattern[i] = pattern[i + PERIOD] = word >> i % 8 * 8;
    }
}

static uint64_t size(int fd) {
    struct stat status;
    must(fstat(fd, &status), "fstat");
    return status.st_size;
}

static void append(int fd, uint64_t offset, size_t count) {
    ssize_t done = write(fd, pattern + offset % PERIOD, count);
    if (done != (ssize_t)count) fail("write to the file: %s", done < 0 ? strerror(errno) : "no room");
}

static void make(void) {
    uint64_t end = size(file);
    if (end > option.bytes) must(ftruncate(file, option.bytes), "ftruncate");
    for (uint64_t count; end < option.bytes; end += count) {
        count = option.bytes - end < BUFFER ? option.bytes - end : BUFFER;
        append(file, end, count);
    }
    must(fdatasync(file), "fdatasync");  // write-back at a later time would disturb the measurement
}

// Connections

static struct sockaddr_in loopback(uint32_t host, int port) {
    return (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(0x7f000000 + host)};
}

static int *far;  // with -B: the other end of each client's connection
static int listener;

static int dial(int number) {
    int fd = must(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket"), one = 1, unsent = UNSENT;
    struct sockaddr_in source = loopback(2 + number / PER_ADDRESS, 0), server = loopback(1, option.port);
    struct linger reset = {.l_onoff = 1};  // the server notices the end at once, and no port stays in TIME_WAIT
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    must(bind(fd, (void *)&source, sizeof source), "bind");
    must(connect(fd, (void *)&server, sizeof server), "connect");
    if (option.senders) {
        if (far[number]) close(far[number]);  // from an earlier connection of this client
        far[number] = must(accept(listener, NULL, NULL), "accept");
        setsockopt(far[number], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        setsockopt(far[number], IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof unsent);
    }
    return fd;
}

static void send_part(int number, uint64_t from, uint64_t to) {
    for (off_t offset = from; (uint64_t)offset < to;) must(sendfile(far[number], file, &offset, to - offset), "sendfile");
}

static void say_header(int fd) {
    if (send(fd, "0\n", 2, MSG_NOSIGNAL) != 2) fail("send a header: %s", strerror(errno));
}

static void watch(int epoll, int fd, int index) {
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = index};
    must(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
}

__attribute__((noreturn)) static void lost(void) { fail("no byte for %d seconds, and not all are there", PATIENCE); }

static int wait_for(int epoll, struct epoll_event *events) {
    int count = epoll_wait(epoll, events, EVENTS, PATIENCE * 1000);
    if (count < 0 && errno == EINTR) return 0;
    if (must(count, "epoll_wait") == 0) lost();
    return count;
}

static void compare(const unsigned char *bytes, uint64_t offset, size_t count) {
    const unsigned char *wanted = pattern + offset % PERIOD;
    if (memcmp(bytes, wanted, count) == 0) return;
    while (*bytes == *wanted) bytes++, wanted++, offset++;
    fail("byte %llu is wrong", (unsigned long long)offset);
}

// Reads what has arrived for a client and returns the number of bytes. With `discard` they are only counted.
static size_t take(struct client *client, bool discard) {
    static __thread unsigned char buffer[BUFFER];
    ssize_t got = recv(client->fd, buffer, discard ? CHUNK : BUFFER, MSG_DONTWAIT | (discard ? MSG_TRUNC : 0));
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
    unsigned long long offset = client->offset;
    if (got < 0) fail("a stream broke after %llu bytes: %s", offset, strerror(errno));
    if (got == 0) fail("a stream ended after %llu bytes", offset);
    if (offset + got > written) fail("more bytes than the file has: %llu of %llu", offset + got, (unsigned long long)written);
    if (!discard) compare(buffer, offset, got);
    client->offset += got;
    return got;
}

// Connects all clients of a reader and waits until each has received the file. At most `window` of them wait for their first byte.
static void join(struct reader *reader, int window) {
    struct epoll_event events[EVENTS];
    int dialled = 0, greeted = 0, caught_up = 0;
    while (caught_up < reader->count) {
        for (; dialled < reader->count && dialled - greeted < window; dialled++) {
            int number = reader->first + dialled, fd = reader->clients[dialled].fd = dial(number);
            watch(reader->epoll, fd, dialled);
            say_header(fd);
            if (option.senders) send_part(number, 0, base);
        }
        for (int i = wait_for(reader->epoll, events); i-- > 0;) {
            struct client *client = &reader->clients[events[i].data.u32];
            bool fresh = client->offset == 0;
            if (!take(client, false)) continue;
            greeted += fresh;
            caught_up += client->offset == base;
        }
    }
}

// Keeps the connections open: when a thread ends, its descriptors are closed.
static void *stay(void) {
    for (;;) pause();
    return NULL;
}

// Checks that no surplus bytes arrive.
static void *finish(struct reader *reader) {
    reader->finished = now();
    for (int i = 0; i < reader->count; i++) take(&reader->clients[i], false);
    pthread_barrier_wait(&gate);
    return stay();
}

static void own_descriptors(void) {
    if (!option.senders) must(unshare(CLONE_FILES), "unshare");  // each thread gets its own descriptor table, so the limit applies to each
}

// Replay

static void dial_all(struct reader *reader) {
    for (int i = 0; i < reader->count; i++) {
        reader->clients[i] = (struct client){.fd = dial(reader->first + i)};
        watch(reader->epoll, reader->clients[i].fd, i);
    }
}

static void take_all(struct reader *reader, bool discard) {
    struct epoll_event events[EVENTS];
    for (int i = 0; i < reader->count; i++) say_header(reader->clients[i].fd);
    for (uint64_t left = base * reader->count; left;)
        for (int i = wait_for(reader->epoll, events); i-- > 0;) left -= take(&reader->clients[events[i].data.u32], discard);
}

enum { COMPARED, TIMED, PASSES };

static void *replay_reader(void *argument) {
    struct reader *reader = argument;
    own_descriptors();
    for (int pass = 0; pass < PASSES; pass++) {
        for (int i = 0; pass > 0 && i < reader->count; i++) close(reader->clients[i].fd);
        dial_all(reader);
        pthread_barrier_wait(&gate);
        pthread_barrier_wait(&gate);
        take_all(reader, pass == TIMED);
        if (pass < TIMED) pthread_barrier_wait(&gate);
    }
    return finish(reader);
}

// Fan-out

static void *follow_reader(void *argument) {
    struct reader *reader = argument;
    struct epoll_event events[EVENTS];
    uint64_t due = (uint64_t)option.records * reader->count;
    own_descriptors();
    join(reader, WINDOW / option.threads + 1);
    pthread_barrier_wait(&gate);
    if (!due) return stay();
    while (reader->deliveries < due)
        for (int i = wait_for(reader->epoll, events); i-- > 0;) {
            struct client *client = &reader->clients[events[i].data.u32];
            uint64_t record = (client->offset - base) / option.length, got = take(client, false), arrived = now();
            for (uint64_t end = (client->offset - base) / option.length; got && record < end; record++) {
                uint64_t latency = arrived - appended_at[record];
                reader->latencies[reader->deliveries++] = latency;
                if (latency > reader->slowest[record]) reader->slowest[record] = latency;
            }
        }
    return finish(reader);
}

static void replay_from_start(struct reader *reader, int index) {
    int fd = dial(option.clients + reader->first + index);
    reader->clients[index] = (struct client){.fd = fd};
    watch(reader->epoll, fd, index);
    say_header(fd);
}

static void *replay_again(void *argument) {
    struct reader *reader = argument;
    struct epoll_event events[EVENTS];
    own_descriptors();
    for (int i = 0; i < reader->count; i++) {
        replay_from_start(reader, i);
    }
    while (replaying)
        for (int i = wait_for(reader->epoll, events); i-- > 0;) {
            int index = events[i].data.u32;
            struct client *client = &reader->clients[index];
            replayed += take(client, false);
            if (client->offset < base) continue;
            close(client->fd);
            replay_from_start(reader, index);
        }
    return stay();
}

// The senders of -B: they do only what every server must do

struct sender {
    pthread_t thread;
    int number, wakeup;
    double cpu;
};

static struct sender *senders;
static _Atomic int sending;  // senders that have not finished

static void wait_until_woken(const struct sender *sender) {
    eventfd_t count;
    must(eventfd_read(sender->wakeup, &count), "eventfd_read");
}

// Sends each append to its share of the clients.
static void send_appends(const struct sender *sender) {
    for (uint64_t sent = base, end = base + (uint64_t)option.records * option.length, there; sent < end; sent = there) {
        wait_until_woken(sender);
        there = size(file);
        for (int i = sender->number; i < option.clients; i += option.senders) send_part(i, sent, there);
    }
}

// Sends the file to its share of the clients, one chunk at a time to each client whose socket has room.
static void send_file(const struct sender *sender) {
    int epoll = must(epoll_create1(EPOLL_CLOEXEC), "epoll_create1"), left = 0;
    off_t *offsets = must_have(calloc(option.clients, sizeof *offsets));
    struct epoll_event events[EVENTS];
    for (int i = sender->number; i < option.clients; i += option.senders, left++) {
        struct epoll_event event = {.events = EPOLLOUT, .data.u32 = i};
        must(fcntl(far[i], F_SETFL, O_NONBLOCK), "fcntl");
        must(epoll_ctl(epoll, EPOLL_CTL_ADD, far[i], &event), "epoll_ctl");
    }
    while (left)
        for (int k = wait_for(epoll, events); k-- > 0;) {
            int i = events[k].data.u32;
            if (sendfile(far[i], file, &offsets[i], CHUNK) < 0 && errno != EAGAIN) fail("sendfile: %s", strerror(errno));
            if ((uint64_t)offsets[i] < base) continue;
            must(epoll_ctl(epoll, EPOLL_CTL_DEL, far[i], NULL), "epoll_ctl");
            left--;
        }
    close(epoll);
    free(offsets);
}

static void *run_sender(void *argument) {
    struct sender *sender = argument;
    double before = 0;
    if (option.records) send_appends(sender);
    else
        for (int pass = 0; pass < PASSES; pass++) {
            wait_until_woken(sender);
            before = cpu_seconds(CLOCK_THREAD_CPUTIME_ID);
            send_file(sender);
        }
    sender->cpu = cpu_seconds(CLOCK_THREAD_CPUTIME_ID) - before;
    sending--;
    return NULL;
}

static void wake_senders(void) {
    for (int i = 0; i < option.senders; i++) eventfd_write(senders[i].wakeup, 1);
}

static void start_senders(void) {
    struct sockaddr_in any = loopback(1, 0);
    socklen_t length = sizeof any;
    far = must_have(calloc(option.clients, sizeof *far));
    senders = must_have(calloc(option.senders, sizeof *senders));
    listener = must(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket");
    must(bind(listener, (void *)&any, sizeof any), "bind");
    must(listen(listener, WINDOW), "listen");
    must(getsockname(listener, (void *)&any, &length), "getsockname");
    option.port = ntohs(any.sin_port);
    sending = option.senders;
    for (int i = 0; i < option.senders; i++) {
        senders[i] = (struct sender){.number = i, .wakeup = must(eventfd(0, 0), "eventfd")};
        pthread_create(&senders[i].thread, NULL, run_sender, &senders[i]);
    }
}

static double senders_cpu(void) {
    double sum = 0;
    while (sending) usleep(100);
    for (int i = 0; i < option.senders; i++) sum += senders[i].cpu;
    return sum;
}

// The main thread

static struct reader *start_readers(void *(*run)(void *), int clients, uint64_t records) {
    struct reader *readers = must_have(calloc(option.threads, sizeof *readers));
    for (int i = 0; i < option.threads; i++) {
        struct reader *reader = &readers[i];
        reader->first = (int64_t)clients * i / option.threads;
        reader->count = (int64_t)clients * (i + 1) / option.threads - reader->first;
        reader->clients = must_have(calloc(reader->count + 1, sizeof *reader->clients));
        reader->latencies = must_have(calloc(records * reader->count + 1, sizeof *reader->latencies));
        reader->slowest = must_have(calloc(records + 1, sizeof *reader->slowest));
        reader->epoll = must(epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
        if ((errno = pthread_create(&reader->thread, NULL, run, reader))) fail("pthread_create: %s", strerror(errno));
    }
    return readers;
}

static uint64_t last_finish(const struct reader *readers) {
    uint64_t last = 0;
    for (int i = 0; i < option.threads; i++)
        if (readers[i].finished > last) last = readers[i].finished;
    return last;
}

static void wait_for_input(void) {
    for (char byte = 0; byte != '\n';)
        if (read(STDIN_FILENO, &byte, 1) != 1) exit(0);
}

static void replay(void) {
    struct reader *readers = start_readers(replay_reader, option.clients, 0);
    double cpu = 0;
    uint64_t start = 0;
    for (int pass = 0; pass < PASSES; pass++) {
        pthread_barrier_wait(&gate);
        if (pass == TIMED) {
            say("{\"ready\": {}}");
            wait_for_input();
        }
        cpu = cpu_seconds(CLOCK_PROCESS_CPUTIME_ID);
        start = now();
        pthread_barrier_wait(&gate);
        wake_senders();
        pthread_barrier_wait(&gate);
    }
    double seconds = (last_finish(readers) - start) / 1e9, bytes = (double)base * option.clients, sender = senders_cpu();
    say("{\"result\": {\"bytes\": %.0f, \"seconds\": %.6f, \"load_cpu_s\": %.6f, \"sender_cpu_s\": %.6f}}", bytes, seconds,
        cpu_seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu - sender, sender);
}

static int by_value(const void *a, const void *b) {
    uint64_t one = *(const uint64_t *)a, other = *(const uint64_t *)b;
    return (one > other) - (one < other);
}

static double percentile(const uint64_t *sorted, uint64_t count, double share) {  // in microseconds
    return sorted[(uint64_t)((count - 1) * share)] / 1e3;
}

static void append_records(void) {
    uint64_t start = now();
    for (int i = 0; i < option.records; i++) {
        uint64_t due = start + i * 1e9 / option.rate;
        struct timespec until = {.tv_sec = due / 1000000000, .tv_nsec = due % 1000000000};
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL)) {}
        uint64_t offset = base + (uint64_t)i * option.length;
        written = offset + option.length;
        appended_at[i] = now();
        if (i == 0 && option.victim) must(kill(option.victim, SIGKILL), "kill");
        append(file, offset, option.length);
        wake_senders();
    }
}

static void report_follow(const struct reader *readers, double seconds, double bytes_replayed, double load_cpu, double sender_cpu) {
    uint64_t count = (uint64_t)option.records * option.clients, at = 0;
    uint64_t *all = must_have(calloc(count, sizeof *all)), *last = must_have(calloc(option.records, sizeof *last));
    for (int i = 0; i < option.threads; i++) {
        memcpy(all + at, readers[i].latencies, readers[i].deliveries * sizeof *all);
        at += readers[i].deliveries;
        for (int k = 0; k < option.records; k++)
            if (readers[i].slowest[k] > last[k]) last[k] = readers[i].slowest[k];
    }
    qsort(all, count, sizeof *all, by_value);
    qsort(last, option.records, sizeof *last, by_value);
    say("{\"result\": {\"deliveries\": %llu, \"seconds\": %.6f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"max_us\": %.2f, "
        "\"last_p50_us\": %.2f, \"last_p99_us\": %.2f, \"replayed\": %.0f, \"load_cpu_s\": %.6f, \"sender_cpu_s\": %.6f}}",
        (unsigned long long)at, seconds, percentile(all, count, .5), percentile(all, count, .99), percentile(all, count, 1),
        percentile(last, option.records, .5), percentile(last, option.records, .99), bytes_replayed, load_cpu, sender_cpu);
}

static void follow(void) {
    uint64_t start = now();
    struct reader *readers = start_readers(follow_reader, option.clients, option.records);
    appended_at = must_have(calloc(option.records + 1, sizeof *appended_at));
    pthread_barrier_wait(&gate);
    say("{\"ready\": {\"joined_s\": %.6f}}", (now() - start) / 1e9);
    wait_for_input();
    if (!option.records) {
        say("{\"result\": {}}");
        return;
    }
    if (option.replayers) {
        replaying = true;
        start_readers(replay_again, option.replayers, 0);
        while (replayed < base) usleep(1000);  // until the replayers have started
        replayed = 0;
    }
    double cpu = cpu_seconds(CLOCK_PROCESS_CPUTIME_ID);
    start = now();
    append_records();
    double seconds = (now() - start) / 1e9, bytes_replayed = replayed;
    pthread_barrier_wait(&gate);
    replaying = false;
    double sender = senders_cpu(), load = cpu_seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu - sender;
    report_follow(readers, seconds, bytes_replayed, load, sender);
}

static void *burst_reader(void *argument) {
    struct reader *reader = argument;
    own_descriptors();
    join(reader, option.clients);
    return finish(reader);
}

static void connect_all(void) {
    say("{\"ready\": {}}");
    wait_for_input();
    uint64_t start = now();
    for (int i = 0; i < option.clients; i++) {
        struct client client = {.fd = dial(i)};
        say_header(client.fd);
        while (client.offset < base) {
            struct pollfd readable = {.fd = client.fd, .events = POLLIN};
            if (must(poll(&readable, 1, PATIENCE * 1000), "poll") == 0) lost();
            take(&client, false);
        }
        close(client.fd);
    }
    uint64_t middle = now();
    struct reader *readers = start_readers(burst_reader, option.clients, 0);
    pthread_barrier_wait(&gate);
    say("{\"result\": {\"serial_s\": %.6f, \"burst_s\": %.6f}}", (middle - start) / 1e9, (last_finish(readers) - middle) / 1e9);
}

static void usage(void) {
    fprintf(stderr, "usage: load make|replay|follow|connect -f FILE [-p PORT] ...; see the head of load.c\n");
    exit(2);
}

int main(int argc, char **argv) {
    if (argc < 2) usage();
    const char *mode = argv[1];
    optind = 2;
    for (int letter; (letter = getopt(argc, argv, "f:b:p:c:n:r:l:k:R:t:B:")) != -1;) {
        switch (letter) {
            case 'f': option.file = optarg; break;
            case 'b': option.bytes = strtoull(optarg, NULL, 10); break;
            case 'p': option.port = atoi(optarg); break;
            case 'c': option.clients = atoi(optarg); break;
            case 'n': option.records = atoi(optarg); break;
            case 'r': option.rate = atof(optarg); break;
            case 'l': option.length = atoi(optarg); break;
            case 'k': option.victim = atoi(optarg); break;
            case 'R': option.replayers = atoi(optarg); break;
            case 't': option.threads = atoi(optarg); break;
            case 'B': option.senders = atoi(optarg); break;
            default: usage();
        }
    }
    if (!option.file || optind != argc || option.clients < 1 || option.records < 0 || option.rate <= 0 || option.length < 1 ||
        option.length > PERIOD || option.threads < 1 || option.senders < 0 || option.victim < 0)
        usage();
    alarm(LIFETIME);
    make_pattern();
    file = must(open(option.file, O_RDWR | O_APPEND | O_CREAT, 0644), "open the file");
    if (!strcmp(mode, "make")) {
        make();
        return 0;
    }
    base = written = size(file);
    if (!base) fail("the file is empty");
    pthread_barrier_init(&gate, NULL, option.threads + 1);
    if (option.senders) start_senders();
    if (!strcmp(mode, "replay")) replay();
    else if (!strcmp(mode, "follow")) follow();
    else if (!strcmp(mode, "connect")) connect_all();
    else usage();
    for (char byte; read(STDIN_FILENO, &byte, 1) > 0;) {}
    return 0;
}
