/* draw_tiles FOLDER WIDTH HEIGHT QUALITY [NAME]: a JPEG of every kind of scan and sampling, as FOLDER/<sampling>_<kind>.jpg, or
   the one of that name.

   Pixels are drawn by rule, the same on every machine: shapes of a few pixels, and grain. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <jpeglib.h>

/* Factors across and down of the three components. */
static const int SAMPLINGS[][6] = {
    {1, 1, 1, 1, 1, 1}, {2, 1, 1, 1, 1, 1}, {1, 2, 1, 1, 1, 1}, {2, 2, 1, 1, 1, 1}, {3, 1, 1, 1, 1, 1}, {1, 3, 1, 1, 1, 1},
    {4, 1, 1, 1, 1, 1}, {1, 4, 1, 1, 1, 1}, {4, 2, 1, 1, 1, 1}, {2, 4, 1, 1, 1, 1}, {3, 2, 1, 1, 1, 1}, {2, 3, 1, 1, 1, 1},
    {4, 4, 1, 1, 1, 1}, {2, 2, 2, 1, 1, 2}, {2, 2, 2, 1, 2, 1}, {2, 1, 2, 1, 2, 1}, {1, 1, 2, 2, 1, 1}, {1, 1, 1, 1, 2, 2},
};
static const char *const KINDS[] = {"baseline", "optimized", "restart", "rows", "separate", "separate_arithmetic", "progressive", "progressive_restart",
                                    "arithmetic", "arithmetic_restart", "arithmetic_progressive"};
#define IS(word) (strstr(kind, word) != NULL)

static unsigned drawn(unsigned seed) {
    seed = (seed ^ 61) ^ (seed >> 16);
    seed *= 9, seed ^= seed >> 4, seed *= 0x27d4eb2d;
    return seed ^ (seed >> 15);
}

static void draw(unsigned char *row, unsigned y, unsigned width, int components) {
    for (unsigned x = 0; x < width; x++)
        for (int i = 0; i < components; i++) {
            const int coarse = drawn(x / 6 * 7919 + y / 5 * 104729 + i * 31 + 1) % 256, grain = drawn(x + y * 4099 + i * 17) % 48;
            const int value = coarse * 4 / 5 + grain;
            row[x * components + i] = value > 255 ? 255 : value;
        }
}

/* 0 where libjpeg cannot: more than ten blocks in an MCU. */
static int encode(FILE *file, unsigned width, unsigned height, int quality, int components, const int *factors, const char *kind) {
    struct jpeg_compress_struct c;
    struct jpeg_error_mgr errors;
    jpeg_scan_info scans[3];
    int blocks = 0;
    for (int i = 0; i < 3; i++) blocks += factors[2 * i] * factors[2 * i + 1];
    if (components == 3 && blocks > C_MAX_BLOCKS_IN_MCU && !IS("separate")) return 0;
    c.err = jpeg_std_error(&errors);
    jpeg_create_compress(&c);
    jpeg_stdio_dest(&c, file);
    c.image_width = width, c.image_height = height, c.input_components = components;
    c.in_color_space = components == 1 ? JCS_GRAYSCALE : components == 3 ? JCS_RGB : JCS_CMYK;
    jpeg_set_defaults(&c);
    jpeg_set_quality(&c, quality, TRUE);
    for (int i = 0; i < components; i++) {
        c.comp_info[i].h_samp_factor = components == 3 ? factors[2 * i] : factors[0];
        c.comp_info[i].v_samp_factor = components == 3 ? factors[2 * i + 1] : factors[1];
    }
    if (IS("progressive")) jpeg_simple_progression(&c);
    if (IS("separate")) {
        for (int i = 0; i < components && i < 3; i++) scans[i] = (jpeg_scan_info){1, {i}, 0, 63, 0, 0};
        c.scan_info = scans, c.num_scans = components;
    }
    c.optimize_coding = IS("optimized");
    c.arith_code = IS("arithmetic");
    if (IS("restart")) c.restart_interval = 3;
    if (IS("rows")) c.restart_in_rows = 1;
    jpeg_start_compress(&c, TRUE);
    unsigned char *row = malloc((size_t)width * components);
    while (c.next_scanline < height) {
        draw(row, c.next_scanline, width, components);
        jpeg_write_scanlines(&c, &row, 1);
    }
    jpeg_finish_compress(&c);
    jpeg_destroy_compress(&c);
    free(row);
    return 1;
}

static void save(char **words, int components, const int *factors, const char *name, const char *kind) {
    char path[4096], own[80];
    snprintf(own, sizeof own, "%s_%s", name, kind);
    if (words[5] && strcmp(words[5], own)) return;
    snprintf(path, sizeof path, "%s/%s.jpg", words[1], own);
    FILE *file = fopen(path, "wb");
    if (!file) {
        perror(path);
        exit(1);
    }
    const int there = encode(file, atoi(words[2]), atoi(words[3]), atoi(words[4]), components, factors, kind);
    fclose(file);
    if (!there) remove(path);
}

int main(int count, char **words) {
    if (count < 5) return 2;
    for (size_t kind = 0; kind < sizeof KINDS / sizeof *KINDS; kind++) {
        for (size_t i = 0; i < sizeof SAMPLINGS / sizeof *SAMPLINGS; i++) {
            const int *f = SAMPLINGS[i];
            char name[40];
            snprintf(name, sizeof name, "%dx%d", f[0], f[1]);
            if (f[2] * f[3] * f[4] * f[5] != 1) snprintf(name, sizeof name, "%dx%d,%dx%d,%dx%d", f[0], f[1], f[2], f[3], f[4], f[5]);
            save(words, 3, f, name, KINDS[kind]);
        }
        if (!strstr(KINDS[kind], "separate")) {
            save(words, 1, SAMPLINGS[0], "grey", KINDS[kind]);
            save(words, 1, SAMPLINGS[3], "grey,2x2", KINDS[kind]);
            save(words, 4, SAMPLINGS[0], "cmyk", KINDS[kind]);
        }
    }
    return 0;
}
