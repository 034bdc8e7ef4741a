// Parallel loops on torch's threads. The library does not link to an OpenMP runtime: Python passes the entry points of
// torch's own (`streamnorm_use`), or nulls, with which every loop runs serially (also in a forked child, whose runtime
// has lost its threads).
#pragma once
#include <sched.h>

#include "isa.h"

extern "C" {
typedef void (*sn_gomp_parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
typedef int (*sn_gomp_number)(void);
extern sn_gomp_parallel sn_parallel_;
extern sn_gomp_number sn_thread_, sn_threads_, sn_most_threads_;
}

namespace {  // nothing here may be shared between instruction sets by the linker

template <class Body>
struct sn_region {
    const Body *body;
    int64_t tasks;
    static void run(void *self) {
        auto *region = static_cast<sn_region *>(self);
        // A runtime may start fewer threads than requested: tasks are distributed over the actual ones.
        for (int64_t t = sn_thread_(); t < region->tasks; t += sn_threads_()) (*region->body)(t);
    }
};

// body(0) ... body(tasks - 1), each once, on at most `threads` threads. A task's result may depend on its number but
// not on the thread, so that runs are reproducible.
template <class Body>
SN_INLINE void parallel(int64_t tasks, int threads, const Body &body) {
    if (tasks < threads) threads = (int)tasks;
    if (threads > 1 && sn_parallel_) {
        sn_region<Body> region{&body, tasks};
        sn_parallel_(&sn_region<Body>::run, &region, (unsigned)threads, 0);
        return;
    }
    for (int64_t t = 0; t < tasks; t++) body(t);
}

// One of several threads that run the same steps, with a barrier between them.
struct sn_member {
    struct Meeting { int there = 0, round = 0; };
    Meeting &meeting;
    int number, members;

    void wait() const {  // for all members
        if (members == 1) return;
        int now = __atomic_load_n(&meeting.round, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&meeting.there, 1, __ATOMIC_ACQ_REL) == members) {
            __atomic_store_n(&meeting.there, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&meeting.round, now + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int spins = 0; __atomic_load_n(&meeting.round, __ATOMIC_ACQUIRE) == now; spins++) {
            if (spins >= 4096) sched_yield();  // the awaited thread may need this core
#if defined(__x86_64__)
            else __builtin_ia32_pause();
#endif
        }
    }
};

// body(member) on each of at most `threads` threads, all at the same time.
template <class Body>
SN_INLINE void together(int threads, const Body &body) {
    sn_member::Meeting meeting;
    if (threads < 2 || !sn_parallel_) return body(sn_member{meeting, 0, 1});
    struct Region {
        const Body &body;
        sn_member::Meeting &meeting;
        static void run(void *self) {
            auto *region = static_cast<Region *>(self);
            region->body(sn_member{region->meeting, sn_thread_(), sn_threads_()});
        }
    } region{body, meeting};
    sn_parallel_(&Region::run, &region, (unsigned)threads, 0);
}

}  // namespace
