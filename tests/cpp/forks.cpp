// Forks while other threads take memory from the pool and return it.
#include <atomic>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "memory/pool.h"
#include "op_test.h"

#include <sys/wait.h>
#include <unistd.h>

namespace op_test {

void take_memory_after_forks(std::int64_t forks) {
    std::atomic<bool> stop{false};
    std::vector<std::thread> others;
    for (int i = 0; i < 4; ++i) {
        others.emplace_back([&] {
            while (!stop) lares_fast::take_from_pool(100);
        });
    }
    std::int64_t hung = 0;
    for (std::int64_t i = 0; i < forks && hung == 0; ++i) {
        const pid_t child = fork();
        if (child == 0) {
            // The child is killed by SIGALRM if it waits for a lock that no thread will open.
            alarm(10);
            lares_fast::take_from_pool(100);
            _exit(0);
        }
        int status = 0;
        waitpid(child, &status, 0);
        hung += status != 0;
    }
    stop = true;
    for (std::thread& other : others) other.join();
    if (hung > 0) fail("a forked child waits for the lock of the pool");
}

}  // namespace op_test
