// Work in parallel: on the threads that torch keeps, else on threads that live for one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <dlfcn.h>
#include <new>
#include <pthread.h>
#include <system_error>
#include <thread>
#include <vector>

// As many of `threads` as `products` multiplications keep busy for longer than it takes to wake one.
inline int64_t useful_threads(int64_t threads, int64_t products) {
    constexpr int64_t WORTH_A_THREAD = 1 << 16;
    return std::clamp<int64_t>(products / WORTH_A_THREAD, 1, std::max<int64_t>(threads, 1));
}

// Runs a function on several threads (libgomp's interface for compilers).
using Team = void (*)(void (*)(void *), void *, unsigned, unsigned);

inline bool forked = false;

// The pool of torch's OpenMP, which torch has loaded for all; null where it has another, or in a forked process, which
// inherits the pool without its threads. A pool of our own would fight with it for the cores; to start a thread for
// each call takes 20 us, on some virtual machines 80.
inline Team torch_team() {
    static const Team team = (Team)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    static const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });
    return forked || watched ? nullptr : team;
}

template <class Run> void run_on_team(Team team, int64_t threads, Run &run) {
    team([](void *data) { (*(Run *)data)(); }, &run, unsigned(threads), 0);
}

// As many as the system has to spare; the caller is one of them.
template <class Run> void run_on_new_threads(int64_t threads, Run &run) {
    std::vector<std::thread> helpers;
    for (int64_t i = 1; i < threads; i++) {
        try {
            helpers.emplace_back([&] { run(); });
        } catch (const std::system_error &) {
            break;
        }
    }
    run();
    for (auto &helper : helpers) helper.join();
}

// work(item) for every item below `items`, in any order, on up to `threads` threads.
template <class Work> void parallel_for(int64_t items, int64_t threads, const Work &work) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};
    auto run = [&] {
        try {
            for (int64_t item; (item = next.fetch_add(1)) < items;) work(item);
        } catch (const std::bad_alloc &) {
            out_of_memory = true;  // an exception must not leave a thread
        }
    };
    threads = std::min(threads, items);
    if (threads <= 1) run();
    else if (const Team team = torch_team()) run_on_team(team, threads, run);
    else run_on_new_threads(threads, run);
    if (out_of_memory) throw std::bad_alloc();
}
