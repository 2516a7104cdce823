/* The entropy code of a baseline JPEG, read in libjpeg's place.

   libjpeg reads one symbol at a time, wanted or not. Here a table gives code and coefficient together, and where no coefficient is
   wanted, all the symbols that thirteen bits hold. Everything else (headers, inverse DCT, chroma, colours) stays libjpeg-turbo's,
   which takes blocks of coefficients from `decode_mcu`, the second entry of its entropy decoder in every version from 1 to 3.

   Only code that is plainly whole is read here: known symbols, blocks of 64 coefficients, the last block ending in the byte before
   the end of the image, or before the restart that is due. For anything else the caller asks libjpeg, whose verdict counts. */

#include "jpegscan.h"

#include <stdlib.h>
#include <string.h>

#define ONE 12       /* bits that the table of single symbols looks at */
#define MANY 13      /* and that of several */
#define END 128      /* what the end of a block adds to the place inside it */
#define LOOKS 4      /* into a table, for which a refill suffices */
#define KEPT 8       /* Huffman tables that a thread remembers */

/* What libjpeg-turbo calls for each MCU: src/jpegint.h begins so in all versions. */
struct jpeg_entropy_decoder {
    void (*start_pass)(j_decompress_ptr c);
    boolean (*decode_mcu)(j_decompress_ptr c, JBLOCKROW *blocks);
};

/* one: by the next ONE bits a coefficient << 16 | places it goes forward << 5 | bits; 0 where ONE bits do not hold it.
   many: by the next MANY bits, of as many symbols as they hold, places << 4 | bits. codes: symbol << 8 | bits of its code alone,
   0 where that is longer. maxcode, offset: of longer codes, by their length. */
struct Codes {
    JHUFF_TBL from;
    int kind; /* 0: none, 1: of DC, 2: of AC */
    unsigned long asked; /* when, to forget what was not for longest */
    uint32_t one[1 << ONE];
    uint16_t many[1 << MANY], codes[1 << ONE];
    int32_t maxcode[18], offset[18];
};

static _Thread_local struct Codes kept[KEPT];
static _Thread_local unsigned long asked;

/* Zigzag order; what lies behind its end is only ever given a zero, and there the last place holds one. */
static const uint8_t ORDER[64] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
                                  41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
                                  30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

static int32_t extended(uint32_t value, int size) {
    return size && value < 1u << (size - 1) ? (int32_t)value - (1 << size) + 1 : (int32_t)value;
}

/* Places that a symbol goes forward: DC has one, AC its run and itself. */
static int advance(int kind, int symbol) {
    return kind == 1 || symbol & 15 ? (kind == 1 ? 0 : symbol >> 4) + 1 : symbol >> 4 == 15 ? 16 : END;
}

/* The next symbol of `bits` and how many of them it takes, or -1. */
static int symbol_of(const struct Codes *codes, uint32_t bits, int *length) {
    for (int size = 1; size <= 16; size++) {
        int32_t code = bits >> (32 - size);
        if (code <= codes->maxcode[size]) {
            *length = size;
            return codes->from.huffval[code + codes->offset[size]];
        }
    }
    return -1;
}

/* A symbol with what follows its code in `bits`, as an entry of `one`. */
static inline uint32_t entry_of(const struct Codes *codes, uint32_t bits, int symbol, int length) {
    const int size = symbol & 15;
    const uint32_t value = extended(size ? bits << length >> (32 - size) : 0, size);
    return value << 16 | (uint32_t)advance(codes->kind, symbol) << 5 | (length + size);
}

static void fill(struct Codes *codes, const JHUFF_TBL *table, int kind) {
    codes->kind = kind;
    codes->from = *table;
    int32_t code = 0, index = 0;
    for (int size = 1; size <= 16; size++, code <<= 1) {
        codes->offset[size] = index - code;
        code += table->bits[size], index += table->bits[size];
        codes->maxcode[size] = table->bits[size] ? code - 1 : -1;
    }
    for (uint32_t bits = 0; bits < 1u << ONE; bits++) {
        int length, symbol = symbol_of(codes, bits << (32 - ONE), &length), size = symbol < 0 ? 0 : symbol & 15;
        const int known = symbol >= 0 && length <= ONE;
        codes->codes[bits] = known ? symbol << 8 | length : 0;
        codes->one[bits] = known && length + size <= ONE ? entry_of(codes, bits << (32 - ONE), symbol, length) : 0;
    }
    for (uint32_t bits = 0; bits < 1u << MANY; bits++) {
        uint32_t used = 0, places = 0;
        while (places < END && used < MANY) {
            int length, symbol = symbol_of(codes, bits << (32 - MANY + used), &length);
            if (symbol < 0 || used + length + (symbol & 15) > MANY) break;
            const uint32_t further = places + advance(kind, symbol);
            if (further >= 64 && further < END) break;
            used += length + (symbol & 15), places = further;
        }
        codes->many[bits] = places << 4 | used;
    }
}

/* The tables of a JHUFF_TBL, remembered from tile to tile. An MCU asks for at most six, so none of them is forgotten meanwhile. */
static const struct Codes *codes_of(const JHUFF_TBL *table, int kind) {
    struct Codes *oldest = kept;
    asked++;
    for (struct Codes *codes = kept; codes < kept + KEPT; codes++) {
        if (codes->kind == kind && !memcmp(codes->from.bits, table->bits, sizeof table->bits) &&
            !memcmp(codes->from.huffval, table->huffval, sizeof table->huffval)) {
            codes->asked = asked;
            return codes;
        }
        if (codes->asked < oldest->asked) oldest = codes;
    }
    fill(oldest, table, kind);
    oldest->asked = asked;
    return oldest;
}

static inline void refill(Bits *b) {
    uint64_t more;
    memcpy(&more, b->next, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    more = __builtin_bswap64(more);
#endif
    b->bits |= more >> b->count;
    b->next += (63 - b->count) >> 3;
    b->count |= 56;
}

static inline uint32_t look(const Bits *b, int width) {
    return b->bits >> (64 - width);
}

static inline void drop(Bits *b, unsigned length) {
    b->bits <<= length;
    b->count -= length;
}

static void stop(Scan *scan) {
    longjmp(*scan->escape, SCAN_STRANGE);
}

/* A symbol of up to 31 bits that `one` does not hold. */
static uint32_t long_symbol(Scan *scan, const struct Codes *codes, Bits *b) {
    refill(b);
    const uint32_t known = codes->codes[look(b, ONE)];
    int length = known & 255, symbol = known ? (int)(known >> 8) : symbol_of(codes, look(b, 32), &length);
    if (symbol < 0) stop(scan);
    return entry_of(codes, look(b, 32), symbol, length);
}

static inline uint32_t symbol(Scan *scan, const struct Codes *codes, Bits *b) {
    const uint32_t entry = codes->one[look(b, ONE)];
    return entry & 31 ? entry : long_symbol(scan, codes, b);
}

/* The 63 coefficients behind the mean, into a block of zeros. */
static inline void read_ac(Scan *scan, const struct Codes *codes, Bits *b, JCOEF *block) {
    unsigned at = 1;
    for (;;) {
        refill(b);
        for (int i = 0; i < LOOKS; i++) {
            uint32_t entry = codes->one[look(b, ONE)];
            if (!(entry & 31)) entry = long_symbol(scan, codes, b), i = LOOKS;
            drop(b, entry & 31);
            at += entry >> 5 & 255;
            if (at >= 64) {
                if (at == 64) block[63] = (JCOEF)(entry >> 16);
                else if (at < END) stop(scan);
                return;
            }
            block[ORDER[at - 1]] = (JCOEF)(entry >> 16);
        }
    }
}

/* The same, but for the place where they end. */
static inline void skip_ac(Scan *scan, const struct Codes *codes, Bits *b) {
    unsigned at = 1;
    for (;;) {
        refill(b);
        for (int i = 0; i < LOOKS; i++) {
            uint32_t entry = codes->many[look(b, MANY)], length = entry & 15, places = entry >> 4, full = at + (places & (END - 1));
            if (!length || full + (places >= END) > 64) { /* too long a symbol, or more than the rest of the block */
                entry = symbol(scan, codes, b), i = LOOKS;
                length = entry & 31, places = entry >> 5 & 255, full = at + (places & (END - 1));
                if (full > 64) stop(scan);
            }
            drop(b, length);
            at = full;
            if (places >= END || at == 64) return;
        }
    }
}

/* The code up to the next marker, without stuffed zeros; 0 where nothing ends it. */
static int unstuff(Scan *scan) {
    const unsigned char *data = scan->from;
    unsigned char *to = scan->bytes;
    for (;;) {
        const unsigned char *mark = memchr(data, 0xFF, scan->stop - data);
        if (!mark || mark + 1 == scan->stop) return 0;
        memcpy(to, data, mark - data);
        to += mark - data;
        if (mark[1]) {
            while (mark + 1 < scan->stop && mark[1] == 0xFF) mark++;
            if (mark + 1 == scan->stop) return 0;
            memset(to, 0, SCAN_SLACK);
            scan->end = to, scan->marker = mark[1], scan->from = mark + 2;
            scan->now = (Bits){0, scan->bytes, 0};
            memset(scan->dc, 0, sizeof scan->dc);
            scan->due = scan->interval;
            return 1;
        }
        *to++ = 0xFF;
        data = mark + 2;
    }
}

/* What was read must end in the byte before the marker that is expected. */
static void check_end(Scan *scan, int marker) {
    const int64_t left = (scan->end - scan->now.next) * 8 + scan->now.count;
    if (left < 0 || left >= 8 || scan->marker != marker) stop(scan);
}

/* blocks: zeros to fill, or NULL. */
static void read_mcu(Scan *scan, JBLOCKROW *blocks) {
    if (scan->interval && scan->due-- == 0) {
        check_end(scan, JPEG_RST0 + scan->restarts++ % 8);
        if (!unstuff(scan)) stop(scan);
        scan->due--;
    }
    Bits b = scan->now;
    for (int i = 0; i < scan->blocks; i++) {
        refill(&b);
        const uint32_t entry = symbol(scan, scan->dc_codes[i], &b);
        drop(&b, entry & 31);
        const int32_t mean = scan->dc[scan->component[i]] += (int16_t)(entry >> 16);
        if (mean != (JCOEF)mean) stop(scan);
        if (blocks) (*blocks[i])[0] = (JCOEF)mean;
        if (blocks && scan->pixels[i]) read_ac(scan, scan->ac_codes[i], &b, *blocks[i]);
        else skip_ac(scan, scan->ac_codes[i], &b);
        if (b.next > scan->end + sizeof b.bits) stop(scan);
    }
    scan->now = b;
    scan->left--;
}

static boolean decode_mcu(j_decompress_ptr c, JBLOCKROW *blocks) {
    Scan *scan = c->client_data;
    read_mcu(scan, scan->column >= scan->first && scan->column <= scan->last ? blocks : NULL);
    scan->column = scan->column + 1 == scan->columns ? 0 : scan->column + 1;
    return TRUE;
}

/* Room for all of the code; 0 where there is no memory. */
static int reserve(Scan *scan, size_t size) {
    if (scan->room >= size + SCAN_SLACK) return 1;
    free(scan->bytes);
    scan->room = size + size / 2 + SCAN_SLACK;
    scan->bytes = malloc(scan->room);
    if (!scan->bytes) scan->room = 0;
    return scan->bytes != NULL;
}

void scan_want(Scan *scan, uint32_t first, uint32_t last) {
    scan->first = first, scan->last = last;
}

int scan_take(Scan *scan, j_decompress_ptr c, jmp_buf *escape) {
    if (c->progressive_mode || c->arith_code || c->data_precision != 8 || c->num_components > SCAN_COMPONENTS ||
        c->comps_in_scan != c->num_components || c->Ss != 0 || c->Se != DCTSIZE2 - 1 || /* lossless ones have a predictor there */
        !reserve(scan, c->src->bytes_in_buffer))
        return 0;
    scan->from = c->src->next_input_byte, scan->stop = scan->from + c->src->bytes_in_buffer;
    scan->interval = c->restart_interval, scan->restarts = 0;
    if (!unstuff(scan)) return 0;
    scan->blocks = c->blocks_in_MCU;
    scan->column = 0, scan->columns = c->MCUs_per_row, scan->left = c->MCUs_per_row * c->MCU_rows_in_scan;
    scan_want(scan, 0, scan->columns - 1);
    scan->escape = escape;
    for (int i = 0; i < scan->blocks; i++) {
        const jpeg_component_info *component = c->cur_comp_info[c->MCU_membership[i]];
        const JHUFF_TBL *dc = c->dc_huff_tbl_ptrs[component->dc_tbl_no], *ac = c->ac_huff_tbl_ptrs[component->ac_tbl_no];
        scan->component[i] = c->MCU_membership[i];
        scan->pixels[i] = DCT_WIDTH(component) > 1;
        scan->dc_codes[i] = codes_of(dc, 1), scan->ac_codes[i] = codes_of(ac, 2);
    }
    c->client_data = scan;
    c->entropy->decode_mcu = decode_mcu;
    return 1;
}

void scan_finish(Scan *scan) {
    while (scan->left) read_mcu(scan, NULL);
    check_end(scan, JPEG_EOI);
}
