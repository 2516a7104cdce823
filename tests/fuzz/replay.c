/* Saved inputs, one after the other, to the function that libFuzzer calls: for a compiler that has no libFuzzer. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define MOST (1 << 20)

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size);

int main(int count, char **paths) {
    for (int i = 1; i < count; i++) {
        FILE *file = fopen(paths[i], "rb");
        if (!file) return perror(paths[i]), 2;
        uint8_t *input = malloc(MOST);
        size_t size = fread(input, 1, MOST, file);
        fclose(file);
        input = realloc(input, size); /* whoever reads behind its end is seen */
        fprintf(stderr, "%s\n", paths[i]); /* the last one said is the one it died of */
        LLVMFuzzerTestOneInput(input, size);
        free(input);
    }
    return 0;
}
