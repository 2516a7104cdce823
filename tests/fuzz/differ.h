/* A part by tile_paint against the whole tile by libjpeg alone: the same verdict, the same pixels, and nothing beside them. */

#include "../../data/readers/jpegtile.h"

#include <jerror.h>
#include <stdlib.h>
#include <string.h>

#define AROUND 3  /* px of the region beside the part, */
#define THERE 0xA5 /* and what stands there */

typedef struct {
    struct jpeg_error_mgr standard;
    jmp_buf escape;
} Oracle;

/* A tile as libjpeg decodes it. pixels: uint8 [height, width, 3]; damaged: they are not all there. */
typedef struct {
    const unsigned char *data;
    size_t size;
    int ycbcr, reduce, damaged;
    unsigned full_width, full_height, width, height;
    unsigned char *pixels;
} Whole;

static void give_up(j_common_ptr c) {
    longjmp(((Oracle *)c->err)->escape, 1);
}

static void take_for_damage(j_common_ptr c, int level) {
    if (level < 0 && c->err->msg_code != JWRN_ADOBE_XFORM && c->err->msg_code != JWRN_JFIF_MAJOR) give_up(c);
}

static void count_scans(j_common_ptr c) {
    if (((j_decompress_ptr)c)->input_scan_number > TILE_SCANS) give_up(c);
}

/* The sides in the header of a JPEG; 0 where it has none, or is larger than `most` px. */
static int sides_of(Whole *tile, unsigned most) {
    struct jpeg_decompress_struct c = {0};
    Oracle oracle;
    c.err = jpeg_std_error(&oracle.standard);
    oracle.standard.error_exit = give_up;
    oracle.standard.emit_message = take_for_damage;
    volatile int found = 0;
    if (setjmp(oracle.escape) == 0) {
        jpeg_create_decompress(&c);
        jpeg_mem_src(&c, tile->data, tile->size);
        jpeg_read_header(&c, TRUE);
        tile->full_width = c.image_width, tile->full_height = c.image_height;
        found = c.image_width <= most && c.image_height <= most;
    }
    jpeg_destroy_decompress(&c);
    return found;
}

/* Fills in what is known of a tile whose data, sides, colour and scale are set. */
static void decode_whole(Whole *tile) {
    struct jpeg_decompress_struct c = {0};
    struct jpeg_progress_mgr progress = {.progress_monitor = count_scans};
    Oracle oracle;
    tile->width = tile->full_width / tile->reduce, tile->height = tile->full_height / tile->reduce;
    tile->pixels = calloc((size_t)tile->width * tile->height, 3);
    tile->damaged = 1;
    c.err = jpeg_std_error(&oracle.standard);
    oracle.standard.error_exit = give_up;
    oracle.standard.emit_message = take_for_damage;
    if (setjmp(oracle.escape) == 0) {
        jpeg_create_decompress(&c);
        c.progress = &progress;
        jpeg_mem_src(&c, tile->data, tile->size);
        jpeg_read_header(&c, TRUE);
        if (c.image_width != tile->full_width || c.image_height != tile->full_height) give_up((j_common_ptr)&c);
        if (c.num_components != 1 && c.num_components != 3) give_up((j_common_ptr)&c);
        if (c.num_components == 3) c.jpeg_color_space = tile->ycbcr ? JCS_YCbCr : JCS_RGB;
        c.out_color_space = JCS_RGB, c.scale_num = 1, c.scale_denom = tile->reduce;
        jpeg_start_decompress(&c);
        if (c.output_width != tile->width || c.output_height != tile->height) give_up((j_common_ptr)&c);
        while (c.output_scanline < c.output_height) {
            JSAMPROW row = tile->pixels + (size_t)c.output_scanline * tile->width * 3;
            jpeg_read_scanlines(&c, &row, 1);
        }
        jpeg_finish_decompress(&c);
        tile->damaged = 0;
    }
    jpeg_destroy_decompress(&c);
}

/* What is wrong with a part of the tile, or NULL. again: how many tiles were decoded twice so far. */
static const char *wrong(const Whole *tile, unsigned left, unsigned top, unsigned right, unsigned bottom, Scan *scan, long *again) {
    const unsigned width = right - left + 2 * AROUND, height = bottom - top + 2 * AROUND;
    unsigned char *pixels = malloc((size_t)width * height * 3), *scratch = malloc((size_t)tile->full_width * 3 * TILE_ROWS);
    memset(pixels, THERE, (size_t)width * height * 3);
    const Place place = {left, top, right, bottom, AROUND, AROUND};
    const Region region = {pixels, width, height, NULL, 0, tile->ycbcr ? JCS_YCbCr : JCS_RGB, tile->full_width, tile->full_height,
                           tile->reduce, scratch, scan, tile_clock() + 20};
    char reason[JMSG_LENGTH_MAX] = "";
    const Verdict verdict = tile_paint(&region, tile->data, tile->size, &place, reason, again);
    const char *found = NULL;
    if (verdict == TILE_LATE) found = "it took more than 20 s";
    else if (verdict == TILE_DAMAGED && !tile->damaged) found = "whole, and called damaged";
    else if (verdict == TILE_WHOLE && tile->damaged) found = "damaged, and called whole";
    else if ((verdict == TILE_DAMAGED) != (reason[0] != 0)) found = "a verdict without its reason";
    for (unsigned y = 0; y < height && !found; y++)
        for (unsigned x = 0; x < width; x++) {
            const int inside = y >= AROUND && y < height - AROUND && x >= AROUND && x < width - AROUND;
            const unsigned char beside[3] = {THERE, THERE, THERE}, *is = pixels + ((size_t)y * width + x) * 3, *should = beside;
            if (inside && verdict == TILE_DAMAGED) continue;
            if (inside) should = tile->pixels + ((size_t)(top + y - AROUND) * tile->width + left + x - AROUND) * 3;
            if (memcmp(is, should, 3)) found = inside ? "other pixels than the whole tile's" : "pixels beside the part were painted";
        }
    free(scratch);
    free(pixels);
    return found;
}
