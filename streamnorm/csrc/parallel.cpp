// Which threads the parallel loops run on; compiled into the library once, with the base instruction set.
#include "parallel.h"

#define SN_IS_base 1
#if SN_JOIN(SN_IS, SN_ISA)

extern "C" {
sn_gomp_parallel sn_parallel_ = nullptr;
sn_gomp_number sn_thread_ = nullptr, sn_threads_ = nullptr, sn_most_threads_ = nullptr;
}

// Torch's GOMP_parallel, omp_get_thread_num, omp_get_num_threads and omp_get_max_threads; if any is null, loops run
// serially.
SN_COMMON(void, streamnorm_use)(void *gomp_parallel, void *thread, void *threads, void *most_threads) {
    bool whole = gomp_parallel && thread && threads && most_threads;
    sn_parallel_ = whole ? reinterpret_cast<sn_gomp_parallel>(gomp_parallel) : nullptr;
    sn_thread_ = reinterpret_cast<sn_gomp_number>(thread);
    sn_threads_ = reinterpret_cast<sn_gomp_number>(threads);
    sn_most_threads_ = reinterpret_cast<sn_gomp_number>(most_threads);
}

#endif
