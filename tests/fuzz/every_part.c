/* every_part STEP FILE...: every part of each tile (STEP 1; else each STEP-th), at every scale, against libjpeg alone. One line for
   each tile and scale: parts, how many were wrong, and the first of them. The exit code is 1 if any was. */

#include "differ.h"

static unsigned char *contents(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        perror(path);
        exit(2);
    }
    unsigned char *bytes = malloc(1 << 20);
    *size = fread(bytes, 1, 1 << 20, file);
    fclose(file);
    return bytes;
}

int main(int count, char **words) {
    const long step = atol(words[1]);
    int code = 0;
    Scan scan = {0};
    for (int i = 2; i < count; i++) {
        Whole tile = {.ycbcr = 1};
        tile.data = contents(words[i], &tile.size);
        if (!sides_of(&tile, 4096)) {
            fprintf(stderr, "%s: no JPEG\n", words[i]);
            return 2;
        }
        for (tile.reduce = 1; tile.reduce <= 8; tile.reduce *= 2) {
            decode_whole(&tile);
            long parts = 0, bad = 0, again = 0;
            char first[200] = "";
            for (unsigned left = 0; left < tile.width; left++)
                for (unsigned right = left + 1; right <= tile.width; right++)
                    for (unsigned top = 0; top < tile.height; top++)
                        for (unsigned bottom = top + 1; bottom <= tile.height; bottom++) {
                            if (parts++ % step) continue;
                            const char *found = wrong(&tile, left, top, right, bottom, &scan, &again);
                            if (found && !bad++)
                                snprintf(first, sizeof first, "(%u, %u, %u, %u): %s", left, top, right, bottom, found);
                        }
            printf("%s reduce %d: %ld parts, %ld wrong %s\n", words[i], tile.reduce, (parts + step - 1) / step, bad, first);
            code |= bad > 0;
            free(tile.pixels);
        }
        free((void *)tile.data);
    }
    free(scan.bytes);
    return code;
}
