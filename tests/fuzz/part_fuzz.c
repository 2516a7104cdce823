/* Any bytes as a tile, any part of it: tile_paint against libjpeg alone.

   Input: colour and scale, left, top, right, bottom (a byte each, taken modulo the tile), and the tile. */

#include "differ.h"

#include <stdint.h>

#define MOST_PX 160
#define HEAD 5

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size) {
    if (size < HEAD) return 0;
    Whole tile = {.data = input + HEAD, .size = size - HEAD, .ycbcr = input[0] & 1, .reduce = 1 << (input[0] >> 1 & 3)};
    if (!sides_of(&tile, MOST_PX) || tile.full_width % tile.reduce || tile.full_height % tile.reduce)
        tile.full_width = tile.full_height = 64; /* another size than the slide says, which must be refused */
    decode_whole(&tile);
    unsigned left = input[1] % tile.width, top = input[2] % tile.height;
    unsigned right = left + 1 + input[3] % (tile.width - left), bottom = top + 1 + input[4] % (tile.height - top);
    Scan scan = {0};
    long again = 0;
    const char *found = wrong(&tile, left, top, right, bottom, &scan, &again);
    if (found) {
        fprintf(stderr, "part (%u, %u, %u, %u) of %ux%u px at reduce %d: %s\n", left, top, right, bottom, tile.full_width,
                tile.full_height, tile.reduce, found);
        abort();
    }
    free(scan.bytes);
    free(tile.pixels);
    return 0;
}
