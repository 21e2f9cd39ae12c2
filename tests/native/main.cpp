// Start the tests at the level that SUBSPACE_ISA asks for; leave with 77 (skipped) where it is missing.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <gtest/gtest.h>

extern "C" {
#include "dispatch.h"
}

int main(int argc, char **argv)
{
    testing::InitGoogleTest(&argc, argv);
    subspace_cpu_init();
    const char *asked = std::getenv("SUBSPACE_ISA");
    if (asked && *asked && std::strcmp(asked, subspace_cpu_isa()) != 0) {
        std::printf("this machine has no %s, only: %s\n", asked, subspace_cpu_isa_available());
        return 77;
    }
    std::printf("instruction set: %s\n", subspace_cpu_isa());
    return RUN_ALL_TESTS();
}
