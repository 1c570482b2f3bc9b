// Work in parallel: threads that live for one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

// As many of `threads` as `products` multiplications keep busy for longer than it takes to start a thread.
inline int64_t useful_threads(int64_t threads, int64_t products) {
    constexpr int64_t WORTH_A_THREAD = 1 << 20;
    return std::clamp<int64_t>(products / WORTH_A_THREAD, 1, std::max<int64_t>(threads, 1));
}

// work(item) for every item below `items`, in any order, on up to `threads` threads.
//
// No pool: torch has one that spins for work, a second would fight with it for the cores, and a pool does not
// survive a fork. To start a thread takes some 20 us.
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
    std::vector<std::thread> helpers;
    for (int64_t i = 1; i < (threads < items ? threads : items); i++) {
        try {
            helpers.emplace_back(run);
        } catch (const std::system_error &) {
            break;  // the system has no thread to spare: those that there are do the work
        }
    }
    run();
    for (auto &helper : helpers) helper.join();
    if (out_of_memory) throw std::bad_alloc();
}
