/* A part of one JPEG tile, decoded with libjpeg-turbo.

   Outside the part only the entropy code is read, by jpegscan.c: no inverse DCT, no colours, no copy of the tile. The rest of the
   scan is read to its end all the same, because damage often shows only there. That is done for the kinds of tiles of which it is
   proven (`proven` below) that the pixels equal those of the whole tile, bit for bit, and where the code is plainly whole. Every
   other tile libjpeg decodes whole, without a word from us, and its verdict counts. */

#include "jpegtile.h"

#include <jerror.h>
#include <string.h>
#include <time.h>

#ifndef LIBJPEG_TURBO_VERSION
#error "libjpeg-turbo is needed: other libjpegs can neither crop nor skip while they decode"
#endif
#if JPEG_LIB_VERSION >= 70
#define DCT_HEIGHT(component) ((component)->DCT_v_scaled_size)
#define MIN_DCT_WIDTH(c) ((c)->min_DCT_h_scaled_size)
#define MIN_DCT_HEIGHT(c) ((c)->min_DCT_v_scaled_size)
#else
#define DCT_HEIGHT(component) ((component)->DCT_scaled_size)
#define MIN_DCT_WIDTH(c) ((c)->min_DCT_scaled_size)
#define MIN_DCT_HEIGHT(c) ((c)->min_DCT_scaled_size)
#endif

typedef struct {
    struct jpeg_error_mgr standard;
    jmp_buf escape;
    char text[JMSG_LENGTH_MAX];
} Errors;

typedef struct {
    struct jpeg_progress_mgr standard;
    int scan;
    double until;
} Progress;

double tile_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

static void fail(j_common_ptr c) {
    Errors *errors = (Errors *)c->err;
    errors->standard.format_message(c, errors->text);
    longjmp(errors->escape, TILE_DAMAGED);
}

/* A warning is damage: libjpeg would go on with grey blocks. Not so for what JFIF and Adobe markers say: the layout decides. */
static void warn(j_common_ptr c, int level) {
    if (level < 0 && c->err->msg_code != JWRN_ADOBE_XFORM && c->err->msg_code != JWRN_JFIF_MAJOR) fail(c);
}

static void refuse(Errors *errors, const char *format, unsigned a, unsigned b, unsigned wanted_a, unsigned wanted_b) {
    snprintf(errors->text, sizeof errors->text, format, a, b, wanted_a, wanted_b);
    longjmp(errors->escape, TILE_DAMAGED);
}

/* libjpeg calls it for every row of blocks of every scan. One scan takes as long as its tile, but ten bytes may be one. */
static void watch(j_common_ptr common) {
    j_decompress_ptr c = (j_decompress_ptr)common;
    Errors *errors = (Errors *)c->err;
    Progress *progress = (Progress *)c->progress;
    if (c->input_scan_number == progress->scan) return;
    progress->scan = c->input_scan_number;
    if (progress->scan > TILE_SCANS) refuse(errors, "it has more than %u scans", TILE_SCANS, 0, 0, 0);
    if (progress->scan > 1 && tile_clock() > progress->until) longjmp(errors->escape, TILE_LATE);
}

/* Leaves the frame header read and checked. */
static void begin(j_decompress_ptr c, Errors *errors, const Region *region, const unsigned char *data, unsigned long size) {
    if (region->tables_size) {
        jpeg_mem_src(c, region->tables, region->tables_size);
        jpeg_read_header(c, FALSE);
    }
    jpeg_mem_src(c, data, size);
    jpeg_read_header(c, TRUE);
    if (c->image_width != region->tile_width || c->image_height != region->tile_height)
        refuse(errors, "its image is %ux%u, expected %ux%u", c->image_width, c->image_height, region->tile_width, region->tile_height);
    if (c->num_components == 3)
        c->jpeg_color_space = region->colour;
    else if (c->num_components != 1)
        refuse(errors, "it has %u components, expected 3", c->num_components, 0, 0, 0);
    c->out_color_space = JCS_RGB;
    c->scale_num = 1;
    c->scale_denom = region->reduce;
    jpeg_start_decompress(c);
    if (c->output_width != region->tile_width / region->reduce || c->output_height != region->tile_height / region->reduce)
        refuse(errors, "its kind decodes to %ux%u, expected %ux%u", c->output_width, c->output_height, region->tile_width / region->reduce,
               region->tile_height / region->reduce);
}

/* Whether parts of a tile of this kind were compared with the whole tile, every part at every scale, and found equal; in libjpeg-
   turbo 2.1.0, 2.1.5 and 3.1.4, by tests/fuzz. Not among them are 4x2 and 2x4, whose parts were wrong when they were reduced. */
static int proven(j_decompress_ptr c) {
    if (LIBJPEG_TURBO_VERSION_NUMBER < 2001000 || LIBJPEG_TURBO_VERSION_NUMBER >= 3002000) return 0;
    for (int i = 1; i < c->num_components; i++)
        if (c->comp_info[i].h_samp_factor != 1 || c->comp_info[i].v_samp_factor != 1) return 0;
    const int across = c->comp_info[0].h_samp_factor, down = c->comp_info[0].v_samp_factor;
    if (c->num_components == 1) return across == 1 && down == 1;
    return (across <= 2 && down <= 2) || (across == 4 && down == 1);
}

/* Rows and columns beside a part that interpolated chroma looks at: one block of the coarsest component. */
static void margins(j_decompress_ptr c, JDIMENSION *across, JDIMENSION *down) {
    *across = *down = 0;
    for (int i = 0; i < c->num_components; i++) {
        jpeg_component_info *component = &c->comp_info[i];
        if (component->h_samp_factor * DCT_WIDTH(component) != c->max_h_samp_factor * MIN_DCT_WIDTH(c) ||
            component->v_samp_factor * DCT_HEIGHT(component) != c->max_v_samp_factor * MIN_DCT_HEIGHT(c)) {
            *across = c->max_h_samp_factor * MIN_DCT_WIDTH(c);
            *down = c->max_v_samp_factor * MIN_DCT_HEIGHT(c);
        }
    }
}

/* Lets libjpeg leave out what lies left, right and above of the part and its margins; the column that its rows then start at. */
static JDIMENSION narrow(j_decompress_ptr c, Scan *scan, JDIMENSION left, JDIMENSION top, JDIMENSION right) {
    JDIMENSION across, down, start = 0, width = c->output_width;
    margins(c, &across, &down);
    const JDIMENSION first = left > across ? left - across : 0, last = right + across < width ? right + across : width;
    if (first > 0 || last < width) {
        start = first, width = last - first;
        jpeg_crop_scanline(c, &start, &width);
    }
    const JDIMENSION mcu = MIN_DCT_WIDTH(c) * (c->num_components == 1 ? 1 : c->max_h_samp_factor);
    scan_want(scan, start / mcu, (start + width - 1) / mcu);
    if (top > down) jpeg_skip_scanlines(c, top - down);
    return start;
}

/* Reads rows before `stop`, at most TILE_ROWS, to memory whose rows are `stride` bytes apart; how many there were. */
static JDIMENSION read_rows(j_decompress_ptr c, JDIMENSION stop, unsigned char *to, size_t stride) {
    JSAMPROW rows[TILE_ROWS];
    JDIMENSION count = stop - c->output_scanline < TILE_ROWS ? stop - c->output_scanline : TILE_ROWS;
    for (JDIMENSION i = 0; i < count; i++) rows[i] = to + i * stride;
    count = jpeg_read_scanlines(c, rows, count);
    if (count == 0) refuse((Errors *)c->err, "libjpeg gives no row behind row %u of %u", c->output_scanline, c->output_height, 0, 0);
    return count;
}

static void decode(j_decompress_ptr c, Errors *errors, const Region *region, const unsigned char *data, unsigned long size,
                   const Place *place, int by_libjpeg) {
    begin(c, errors, region, data, size);
    const JDIMENSION left = place->left, top = place->top, right = place->right, bottom = place->bottom;
    const int ours = !by_libjpeg && proven(c) && scan_take(region->scan, c, &errors->escape);
    const JDIMENSION start = ours ? narrow(c, region->scan, left, top, right) : 0;
    const size_t stride = region->width * 3, row = (size_t)c->output_width * 3, wanted = (size_t)(right - left) * 3;
    while (c->output_scanline < top) read_rows(c, top, region->scratch, row);
    unsigned char *out = region->pixels + place->y * stride + place->x * 3;
    while (c->output_scanline < bottom) {
        if (row == wanted) {
            out += read_rows(c, bottom, out, stride) * stride;
            continue;
        }
        JDIMENSION count = read_rows(c, bottom, region->scratch, row);
        for (JDIMENSION i = 0; i < count; i++, out += stride) memcpy(out, region->scratch + i * row + (left - start) * 3, wanted);
    }
    if (ours) { /* libjpeg is not asked to skip what is left, which it may do for ever: it is let go as it is */
        scan_finish(region->scan);
        return;
    }
    while (c->output_scanline < c->output_height) read_rows(c, c->output_height, region->scratch, row);
    jpeg_finish_decompress(c);
}

/* Each decompressor is its tile's own: tables of another tile must not serve one that lacks them. */
static Verdict attempt(const Region *region, const unsigned char *data, size_t size, const Place *place, int by_libjpeg, char *reason) {
    struct jpeg_decompress_struct c = {0};
    Errors errors = {0};
    Progress progress = {0};
    c.err = jpeg_std_error(&errors.standard);
    errors.standard.error_exit = fail;
    errors.standard.emit_message = warn;
    const int verdict = setjmp(errors.escape);
    if (verdict == TILE_WHOLE) {
        if (size == 0) refuse(&errors, "it is empty", 0, 0, 0, 0);
        jpeg_create_decompress(&c);
        progress.standard.progress_monitor = watch;
        progress.until = region->until;
        c.progress = &progress.standard;
        decode(&c, &errors, region, data, size, place, by_libjpeg);
    } else if (verdict == TILE_DAMAGED) {
        memcpy(reason, errors.text, sizeof errors.text);
    }
    jpeg_destroy_decompress(&c);
    return verdict;
}

Verdict tile_paint(const Region *region, const unsigned char *data, size_t size, const Place *place, char reason[JMSG_LENGTH_MAX],
                   long *again) {
    if (tile_clock() > region->until) return TILE_LATE;
    const Verdict verdict = attempt(region, data, size, place, 0, reason);
    if (verdict != TILE_STRANGE) return verdict;
    __atomic_fetch_add(again, 1, __ATOMIC_RELAXED);
    return attempt(region, data, size, place, 1, reason);
}
