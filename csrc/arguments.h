// Reads the keyword arguments of a function that Python calls. Only the bindings include this file.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace lares_fast {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// The keyword arguments of one call. Each is taken once, by its name.
class Arguments {
public:
    explicit Arguments(const pybind11::kwargs& given) : given_(given), left_(given.size()) {}

    bool has(const char* name) const { return PyDict_GetItemString(given_.ptr(), name) != nullptr; }

    template <class T>
    T take(const char* name) {
        PyObject* const value = PyDict_GetItemString(given_.ptr(), name);
        if (!value) throw pybind11::type_error(std::string(name) + " is missing");
        --left_;
        try {
            return pybind11::handle(value).cast<T>();
        } catch (const pybind11::cast_error&) {
            throw pybind11::type_error(std::string(name) + " has a wrong type or is out of range");
        }
    }

    // A tensor, by its address; 0 stands for none.
    template <class T>
    T* tensor(const char* name) {
        return pointer<T>(take<std::uintptr_t>(name));
    }

    // The value that the string `name` stands for.
    template <class T>
    T one_of(const char* name, std::initializer_list<std::pair<const char*, T>> values) {
        const auto given = take<std::string>(name);
        for (const auto& [word, value] : values) {
            if (given == word) return value;
        }
        throw std::invalid_argument(std::string(name) + " has an unknown value");
    }

    // Takes an argument into its place in a struct, whose type decides what is accepted.
    template <class T>
    Arguments& read(const char* name, T*& place) {
        place = tensor<T>(name);
        return *this;
    }

    template <class T>
    Arguments& read(const char* name, T& place) {
        place = take<T>(name);
        return *this;
    }

    // Must be called before the work begins. Throws if an argument is left.
    void end() const {
        if (left_) throw pybind11::type_error("an unknown argument was given");
    }

private:
    const pybind11::kwargs& given_;
    std::size_t left_;
};

// Takes the interpreter's lock again. When the interpreter ends, Python (before 3.14) ends the threads that want its lock here,
// by unwinding their stacks. That would run destructors of Python objects without the lock, and a destructor that takes the lock
// would end the process with an error. Such a thread waits for the end of the process instead.
inline void lock_again(PyThreadState* state) {
    try {
        PyEval_RestoreThread(state);
    } catch (...) {
        for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
}

// Calls `work` without the interpreter's lock, so that other Python threads can run.
template <class Work>
void unlocked(const Arguments& arguments, const Work& work) {
    arguments.end();
    PyThreadState* const state = PyEval_SaveThread();
    std::exception_ptr error;
    try {
        work();
    } catch (...) {
        error = std::current_exception();
    }
    lock_again(state);
    if (error) std::rethrow_exception(error);
}

}  // namespace lares_fast
